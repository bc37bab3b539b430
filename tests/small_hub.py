"""A hub of one repository that is a folder, over HTTP on this machine; notes how many bytes of each file it sent."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/name"


class SmallHub:
    """Serves until `close`.

    Args:
        folder: the repository.
        knows_ranges: whether a request for a part is answered with that part, as the real hub does.
    """

    def __init__(self, folder, *, knows_ranges=True):
        self.sent = sent = Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(has_body=False)

            def do_GET(self):
                self.answer(has_body=True)

            def answer(self, has_body):
                path = self.path.split("?")[0]
                if path.startswith(f"/api/models/{NAME}"):
                    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
                    listed = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in sorted(names)]}
                    if "/tree/" in path:
                        listed = [
                            {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
                            for name in names
                        ]
                    return self.reply(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, has_body)
                file = folder / path.partition(f"/{NAME}/resolve/")[2].partition("/")[2]
                if not file.is_file():
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, has_body)
                return self.send_file(path, file, has_body)

            def send_file(self, path, file, has_body):
                size, first, last = file.stat().st_size, 0, file.stat().st_size - 1
                told = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                asked, status = self.headers.get("Range"), 200
                if asked and knows_ranges:
                    first, last = (int(edge) if edge else last for edge in asked.removeprefix("bytes=").split("-"))
                    last, status = min(last, size - 1), 206
                    told["Content-Range"] = f"bytes {first}-{last}/{size}"
                with file.open("rb") as stream:
                    stream.seek(first)
                    self.reply(status, stream, told, has_body, last - first + 1)
                    if has_body:
                        sent[file.name] += last - first + 1

            def reply(self, status, body, told, has_body, length=None):
                self.send_response(status)
                for name, value in told.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if not has_body:
                    return
                if length is None:
                    self.wfile.write(body)
                    return
                while length and (piece := body.read(min(length, 1 << 16))):
                    try:
                        self.wfile.write(piece)
                    except ConnectionError:  # the client has what it wants
                        self.close_connection = True
                        return
                    length -= len(piece)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
