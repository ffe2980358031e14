"""Opens a page in Chromium, runs a script in it, and prints what came of it as JSON; the script comes from stdin.

    python tests/browser.py PAGE [PDF]

The browser is Qt WebEngine, Chromium in a package of pip's (PySide6-WebEngine); it shows nothing and needs no screen.
"""

import json
import os
import sys

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"

from PySide6.QtCore import QEventLoop, QUrl
from PySide6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication


class Requests(QWebEngineUrlRequestInterceptor):
    def __init__(self):
        super().__init__()
        self.urls = []

    def interceptRequest(self, info):
        self.urls.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    def __init__(self, profile):
        super().__init__(profile)
        self.console = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.console.append(message)


def wait(start):
    """What a call of Qt's gives to the function that it is given, once it does."""
    loop, results = QEventLoop(), []

    def finished(*result):
        results.append(result)
        loop.quit()

    start(finished)
    loop.exec()
    return results[0]


def main(path, pdf=None):
    application = QApplication([])  # as long as it lives there is a loop of events
    profile, requests = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    profile.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    page, view = Page(profile), QWebEngineView()
    view.setPage(page)
    view.resize(1200, 900)
    view.show()

    def load(finished):
        page.loadFinished.connect(finished)
        page.load(QUrl.fromLocalFile(path))

    def print_to(finished):
        page.pdfPrintingFinished.connect(finished)
        page.printToPdf(pdf)

    wait(load)
    # A value comes back as text: Qt's own conversion knows no NaN.
    script = f"JSON.stringify((() => {{ {sys.stdin.read()} }})() ?? null)"
    (text,) = wait(lambda finished: page.runJavaScript(script, 0, finished))
    if pdf is not None:
        wait(print_to)
    result = json.loads(text) if text else None
    print(json.dumps({"result": result, "console": page.console, "requests": requests.urls}))
    sys.stdout.flush()
    assert application.platformName() == "offscreen"
    os._exit(0)  # Qt takes its parts down in an order of its own


if __name__ == "__main__":
    main(*map(os.path.abspath, sys.argv[1:]))
