/* What a function needs to be seen by ctypes. */

#ifndef ALTGRAD_EXPORT_H
#define ALTGRAD_EXPORT_H

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#endif
