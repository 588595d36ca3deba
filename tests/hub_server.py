"""A small server of the Hub's protocol on 127.0.0.1, for downloads and uploads, with faults on demand.

    with HubServer() as server:
        server.commit('owner/name', {'config.json': b'{}', 'model.safetensors': weights})
        server.fault('GET', 'name/resolve/.*safetensors', times=1, body=flip)  # the next download is damaged
        run_client(env=server.env)
        server.repos['owner/name'].files('main'), server.requests

`commit` adds or replaces files of `main` (or of another branch) and returns the commit. `HubServer.env` has the
environment variables of a client. `HubServer.requests` lists what was asked: `Request(method, path, host, token)`.

A `fault` changes the answers to those requests that have its method and whose path its regular expression finds. Each
keyword replaces an attribute of the `Answer`, or is a function of its old value: `status`, `headers` (merged; None
takes one away), `body`, `delay` (seconds before the answer), `cut` (number of bytes after which the body ends) and
`end`, what happens then: 'close', 'reset' (RST) or 'stall' (no more bytes until `HubServer` closes). `times` limits it,
and `server.faults.clear()` ends all.

Files that end in .safetensors, .bin or .png travel as large ones do: named by their sha256, uploaded by the LFS
protocol (Git LFS, since a client has HF_HUB_DISABLE_XET=1). With `redirect=True` they are served from another host name
(`localhost`), which must not see a token. Private repositories and every upload need `TOKEN`.
"""
import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_0123456789abcdefghij'
LARGE = ('.safetensors', '.bin', '.png')


class Request(NamedTuple):
    method: str
    path: str
    host: str
    token: Optional[str]


@dataclass
class Answer:
    """What goes back to a client; faults change it."""
    status: int = 200
    headers: dict[str, Optional[str]] = field(default_factory=dict)
    body: bytes = b''
    delay: float = 0
    cut: Optional[int] = None
    end: str = 'close'


@dataclass
class Fault:
    method: str
    path: str
    times: float
    changes: dict[str, Any]


@dataclass
class Repo:
    """Commits of a repository, oldest first, and its branches."""
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def sha(self, revision: str) -> Optional[str]:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = 'main') -> dict[str, bytes]:
        return self.commits.get(self.sha(revision), {})


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def flip(content: bytes) -> bytes:
    """Changes one byte, the last but ten."""
    return content[:-10] + bytes([content[-10] ^ 0xff]) + content[-9:]


class HubServer:
    """Serves repositories from memory; see above."""

    def __init__(self, redirect: bool = False):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.redirect = redirect
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.http = _Http(('127.0.0.1', 0), type('Handler', (_Handler,), dict(hub=self)))
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        self.env = dict(HF_ENDPOINT=self.url, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='*')

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        """Forgets all repositories, requests and faults."""
        with self.lock:
            for memory in (self.repos, self.blobs, self.requests, self.faults):
                memory.clear()
        self.redirect = False

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = 'main', **attributes) -> str:
        repo = self.repos.setdefault(repo_id, Repo())
        for name, value in attributes.items():
            setattr(repo, name, value)
        files = {**(repo.files(branch) or repo.files()), **files}
        sha = hashlib.sha1(f'{repo_id} {len(repo.commits)} {branch}'.encode()).hexdigest()
        repo.commits[sha] = files
        repo.refs[branch] = sha
        self.blobs.update((sha256(content), content) for content in files.values())
        return sha

    def fault(self, method: str, path: str, times: float = float('inf'), **changes) -> None:
        self.faults.append(Fault(method, path, times, changes))

    def count(self, method: str, path: str) -> int:
        """Number of requests so far."""
        return sum(request.method == method and bool(re.search(path, request.path)) for request in self.requests)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def shutdown_request(self, request):
        # A socket that lingers for no time is to be reset, without the polite end of a shutdown.
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack('ii', 1, 0):
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass  # clients that go away are part of the tests


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def _serve(self):
        if self.hub.closing.is_set():  # a connection that a client kept open
            self.close_connection = True
            return
        url = urlsplit(self.path)
        path = unquote(url.path)
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ') or None
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.headers.get('Host', ''), token))
            answer = self._answer(url.path, parse_qs(url.query), body, token)
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    for name, value in fault.changes.items():
                        old = getattr(answer, name)
                        value = value(old) if callable(value) else value
                        setattr(answer, name, {**old, **value} if name == 'headers' else value)
        self._send(answer)

    do_HEAD = do_GET = do_POST = do_PUT = _serve

    def _send(self, answer: Answer):
        self.hub.closing.wait(answer.delay)
        body = answer.body
        chunked = 'Transfer-Encoding' in answer.headers
        self.send_response(answer.status)
        headers = {} if chunked else {'Content-Length': str(len(body))}
        for name, value in {**headers, **answer.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            body = b''
        elif chunked:
            parts = [body[:1000], body[1000:], b'']
            body = b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in parts if part or part is parts[-1])
        self.wfile.write(body[:answer.cut])
        self.wfile.flush()
        if answer.cut is not None:
            self.close_connection = True
            if answer.end == 'stall':
                self.hub.closing.wait()
            elif answer.end == 'reset':
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes, token: Optional[str]) -> Answer:
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ('HEAD|GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self._resolve),
            ('HEAD|GET', r'/cdn/(\w+)', self._cdn),
            ('GET', r'/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?', self._info),
            ('GET', r'/api/models/([^/]+/[^/]+?)/tree/(.+)', self._tree),
            ('GET', r'/api/whoami-v2', lambda: _json(dict(type='user', name='tester', orgs=[]))),
            ('POST', r'/api/repos/create', self._create),
            ('POST', r'/api/validate-yaml', lambda: _json(dict(errors=[], warnings=[]))),
            ('POST', r'/api/models/([^/]+/[^/]+)/preupload/(.+)', self._preupload),
            ('POST', r'/api/models/([^/]+/[^/]+)/commit/(.+)', self._commit),
            ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', self._batch),
            ('PUT', r'/lfs/(\w+)', self._put),
            ('POST', r'/lfs/verify', lambda: _json({})),
        ]
        self._query, self._body, self._token = query, body, token
        for method, pattern, route in routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split('|'):
                if self.command == 'POST' and path != '/api/validate-yaml' and token != TOKEN:
                    return _error(401, 'Unauthorized')
                groups = [group and unquote(group) for group in match.groups()]
                if groups and '/' in groups[0]:
                    repo = self.hub.repos.get(groups[0])
                    if repo is None or repo.private and token != TOKEN:
                        return _error(401, 'Repository not found', 'RepoNotFound')
                    if repo.gated and token != TOKEN and self.command == 'GET' or repo.gated and '/resolve/' in path:
                        return _error(403, 'Access is restricted', 'GatedRepo')
                return route(*groups)
        return _error(404, f'No route for {self.command} {path}')

    # Downloads

    def _resolve(self, repo_id: str, revision: str, name: str) -> Answer:
        repo = self.hub.repos[repo_id]
        sha = repo.sha(revision)
        if sha is None:
            return _error(404, f'Revision {revision} not found', 'RevisionNotFound')
        if name not in repo.files(sha):
            answer = _error(404, f'Entry {name} not found', 'EntryNotFound')
            answer.headers['X-Repo-Commit'] = sha
            return answer
        content = repo.files(sha)[name]
        headers = {'X-Repo-Commit': sha, 'ETag': f'"{git_sha1(content)}"'}
        if name.endswith(LARGE):
            digest = sha256(content)
            headers |= {'ETag': f'"{digest}"', 'X-Linked-Etag': f'"{digest}"', 'X-Linked-Size': str(len(content))}
            if self.hub.redirect:
                location = f'http://localhost:{self.hub.http.server_port}/cdn/{digest}'
                return Answer(302, {**headers, 'Location': location})
        return self._content(content, headers)

    def _cdn(self, digest: str) -> Answer:
        if digest not in self.hub.blobs:
            return _error(404, 'No such object')
        return self._content(self.hub.blobs[digest], {'ETag': f'"{digest}"'})

    def _content(self, content: bytes, headers: dict) -> Answer:
        headers['Accept-Ranges'] = 'bytes'
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if not match:
            return Answer(200, headers, content)
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if first > last:
            return Answer(416, {'Content-Range': f'bytes */{len(content)}'})
        headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
        return Answer(206, headers, content[first:last + 1])

    def _info(self, repo_id: str, revision: Optional[str]) -> Answer:
        repo = self.hub.repos[repo_id]
        sha = repo.sha(revision or 'main')
        if sha is None and revision:
            return _error(404, f'Revision {revision} not found', 'RevisionNotFound')
        siblings = [
            dict(rfilename=name) | (self._blob(content, name) if 'blobs' in self._query else {})
            for name, content in repo.files(sha).items()
        ]
        return _json(dict(id=repo_id, modelId=repo_id, sha=sha, private=repo.private, siblings=siblings))

    def _tree(self, repo_id: str, revision: str) -> Answer:
        files = self.hub.repos[repo_id].files(revision.split('/')[0])
        return _json([
            dict(type='file', path=name, oid=git_sha1(content), size=len(content)) for name, content in files.items()
        ])

    @staticmethod
    def _blob(content: bytes, name: str) -> dict:
        blob = dict(size=len(content), blobId=git_sha1(content))
        if name.endswith(LARGE):
            blob['lfs'] = dict(sha256=sha256(content), size=len(content), pointerSize=130)
        return blob

    # Uploads

    def _create(self) -> Answer:
        wish = json.loads(self._body)
        repo_id = f'{wish.get("organization") or "tester"}/{wish["name"]}'
        url = f'{self.hub.url}/{repo_id}'
        if repo_id in self.hub.repos:
            return _json(dict(error='You already created this model repo', url=url), 409)
        self.hub.repos[repo_id] = Repo(private=bool(wish.get('private')) or wish.get('visibility') == 'private')
        self.hub.commit(repo_id, {'.gitattributes': b'*.safetensors filter=lfs\n'})
        return _json(dict(url=url, name=repo_id, id=repo_id))

    def _preupload(self, repo_id: str, revision: str) -> Answer:
        held = self.hub.repos[repo_id].files(revision)

        def plan(path: str) -> dict:
            large = path.endswith(LARGE)
            oid = held.get(path) and (sha256 if large else git_sha1)(held[path])
            return dict(path=path, uploadMode='lfs' if large else 'regular', shouldIgnore=False, oid=oid)

        return _json(dict(files=[plan(file['path']) for file in json.loads(self._body)['files']], commitOid=''))

    def _batch(self, repo_id: str) -> Answer:
        def plan(oid: str, size: int) -> dict:
            if oid in self.hub.blobs:
                return dict(oid=oid, size=size)
            actions = dict(
                upload=dict(href=f'{self.hub.url}/lfs/{oid}'),
                verify=dict(href=f'{self.hub.url}/lfs/verify'),
            )
            return dict(oid=oid, size=size, authenticated=True, actions=actions)

        objects = [plan(item['oid'], item['size']) for item in json.loads(self._body)['objects']]
        return _json(dict(transfer='basic', objects=objects))

    def _put(self, oid: str) -> Answer:
        if sha256(self._body) != oid:
            return _error(400, 'The content does not have this digest')
        self.hub.blobs[oid] = self._body
        return Answer()

    def _commit(self, repo_id: str, revision: str) -> Answer:
        repo = self.hub.repos[repo_id]
        files = {}
        for line in self._body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                if value['oid'] not in self.hub.blobs:
                    return _error(400, f'{value["path"]}: its content was not uploaded')
                files[value['path']] = self.hub.blobs[value['oid']]
        answer = {}
        if self._query.get('create_pr') == ['1']:
            number = sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1
            revision = f'refs/pr/{number}'
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo_id}/discussions/{number}'
        sha = self.hub.commit(repo_id, files, revision)
        return _json(answer | dict(success=True, commitOid=sha, commitUrl=f'{self.hub.url}/{repo_id}/commit/{sha}'))


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, {'Content-Type': 'application/json'}, json.dumps(value).encode())


def _error(status: int, message: str, code: Optional[str] = None) -> Answer:
    answer = _json(dict(error=message), status)
    answer.headers |= {'X-Error-Code': code, 'X-Error-Message': message}
    return answer
