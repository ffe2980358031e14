// Runs a package of AOTInductor on ROWS rows of numbers and prints the results as hexadecimal floats, one row a line:
// run_package MODEL.pt2 ROWS COLUMNS DEVICE. Neither Python nor altgrad is in this process.
#include <cstdio>
#include <cstdlib>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 ROWS COLUMNS DEVICE\n", argv[0]);
    return 1;
  }
  const int64_t rows = std::atoll(argv[2]), columns = std::atoll(argv[3]);
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor x = at::arange(rows * columns, at::kFloat).view({rows, columns}).div(7).sub(20);
  const at::Tensor y = model.run({x.to(at::Device(argv[4]))}).at(0).cpu().contiguous();
  for (int64_t i = 0; i < y.numel(); i++) {
    std::printf("%a%c", y.const_data_ptr<float>()[i], (i + 1) % columns ? ' ' : '\n');
  }
}
