// Writes the seeds of the fuzzers to corpus/: `node tests/fuzz/make_corpus.js`.
// Files of other names there, such as those of crashes, are left alone.
//
// SPDX-License-Identifier: MIT
import fs from 'node:fs'
import path from 'node:path'
import crypto from 'node:crypto'
import { fileURLToPath } from 'node:url'

const here = path.dirname(fileURLToPath(import.meta.url))

function put (corpus, seeds) {
  const folder = path.join(here, 'corpus', corpus)
  fs.mkdirSync(folder, { recursive: true })
  for (const [name, bytes] of Object.entries(seeds)) {
    fs.writeFileSync(path.join(folder, name), bytes)
  }
}

// ----- heads ---------------------------------------------------------------------

const key = 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n'
const upgrade = 'Upgrade: websocket\r\nConnection: Upgrade\r\n' +
  'Sec-WebSocket-Version: 13\r\n' + key

function request (target, fields = '', method = 'GET', version = '1.1') {
  return `${method} ${target} HTTP/${version}\r\nHost: box.lan\r\n${fields}\r\n`
}

put('http', {
  'root': request('/'),
  'old': 'GET / HTTP/1.0\r\n\r\n',
  'empty-line-ahead': '\r\n' + request('/healthz'),
  'two-at-once': request('/metrics') + request('/'),
  'upgrade': request('/ws/notes?echo=1&history=5', upgrade),
  'upgrade-firefox': request('/ws/caf%C3%A9/%F0%9F%98%80',
    'Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n' +
    'Sec-WebSocket-Version: 13\r\n' + key + 'Origin: https://a.example:443\r\n' +
    'Sec-WebSocket-Extensions: permessage-deflate\r\nCookie: a=b; collabd_token=t\r\n'),
  'upgrade-version-8': request('/ws/a', upgrade.replace('13', '8')),
  'upgrade-bad-key': request('/ws/a', upgrade.replace('==', 'X=')),
  'upgrade-protocols': request('/ws/a', upgrade + 'Sec-WebSocket-Protocol: x, y\r\n'),
  'absolute': request('http://b.example:8080/ws/a?b'),
  'absolute-no-path': request('https://b.example?q'),
  'options-star': request('*', '', 'OPTIONS'),
  'head': request('/a.js', 'Accept-Encoding: br, gzip;q=0.5, *;q=0\r\n', 'HEAD'),
  'post': request('/', 'Content-Length: 5\r\n', 'POST') + 'hello',
  'chunked': request('/', 'Transfer-Encoding: chunked\r\n', 'PUT'),
  'both-lengths': request('/', 'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n'),
  'two-lengths': request('/', 'Content-Length: 5\r\nContent-Length: 6\r\n'),
  'connect': request('a:1', '', 'CONNECT'),
  'unknown-method': request('/', '', 'BREW'),
  'http-2': request('/', '', 'GET', '2.0'),
  'no-host': 'GET / HTTP/1.1\r\n\r\n',
  'two-hosts': request('/', 'Host: b\r\n'),
  'host-v6': 'GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n',
  'folded': request('/', 'X: a\r\n b\r\n'),
  'space-before-colon': request('/', 'X : a\r\n'),
  'bare-lf': 'GET / HTTP/1.1\nHost: a\n\n',
  'bare-cr': request('/', 'X: a\rb\r\n'),
  'range': request('/sub/', 'Range: bytes=2-5\r\nIf-Range: "x"\r\n'),
  'range-suffix': request('/a.js', 'Range: bytes=-3\r\nAccept-Encoding: gzip\r\n'),
  'none-match': request('/index.html', 'If-None-Match: W/"a", *\r\n'),
  'dots': request('/sub/../../secret'),
  'dots-escaped': request('/%2e%2e/%2Fsecret'),
  'link': request('/link'),
  'nul': request('/a%00.js'),
  'folder': request('/sub'),
  'token': request('/?token=abc%2Fd&x', 'Authorization: Bearer x.y-z\r\n'),
  'forwarded': request('/', 'X-Forwarded-For: 1.2.3.4, [::1]:5\r\n' +
    'X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\n'),
  'origin-foreign': request('/', 'Origin: http://<evil>\r\n', 'OPTIONS'),
  'long-target': request('/' + 'x'.repeat(2047)),
  'too-long-target': request('/' + 'x'.repeat(2048))
})

// ----- settings ---------------------------------------------------------------------

put('cfg', {
  'all': `# every setting
listen = 127.0.0.1:8080
listen = [::1]:8080
listen = unix:/run/collabd.sock
tls-listen = 8443
tls-cert = /etc/cert.pem
tls-key = /etc/key.pem
unix-mode = 0600
tokens = /etc/tokens
origin = https://a.example
origin = null
host = b.example
trust-proxy = 127.0.0.1, unix, ::1
www = /srv/www
max-clients = 1000
max-rooms = 8
max-per-ip = 20
max-message = 64K
max-tls = 5
max-handshakes = 2
max-requests = 9
receive-buffers = 7
ring = 128K
message-memory = 1M
socket-buffer = 32K
memory = 1G
rate-messages = 50
rate-bytes = 1M
coalesce = 10
ping-interval = 20
dead-after = 45
request-timeout = 5
log-level = debug
syslog = yes
user = nobody
chroot = /var/empty
prefault = no
`,
  'blank': '\n\n  \t\n# only a comment\r\n',
  'crlf': 'max-rooms = 3\r\nmax-clients = 4\r\n',
  'no-newline': 'max-rooms = 3',
  'flags': '# file\nmax-rooms = 3\n%%\n--max-rooms\n4\n--listen=0\n--syslog\n',
  'flags-only': '\n%%\n--host\na.example\n--host\nb.example\n--check\n',
  'flags-missing-value': '\n%%\n--max-rooms',
  'flags-unknown': '\n%%\n--nonsense=1\n8080\n-h\n',
  'flags-actions': '\n%%\n--config=/x\n--make-cert\n/tmp/x\n--show-memory\n',
  'unknown': 'no-such = 1\nmax_rooms = 2\n= 3\nrubbish\n',
  'ranges': 'max-message = 124\nmax-message = 1G\nring = 65537\nring = 1G\n' +
    'unix-mode = 7777\nunix-mode = 08\nmemory = 1024G\n',
  'numbers': 'memory = 99999999999999999999\nmemory = K\nmemory = -1\n' +
    'memory = 1.5M\nmemory = 8589934591G\n',
  'addresses': ['80', ':80', '[::1', '[::1]', '::1', 'a:b:80', 'unix:', 'x/y:80',
    '1.2.3:80', '[1.2.3.4]:80', '65536'].map(a => `listen = ${a}\n`).join(''),
  'origins': ['*', 'null', 'a', 'http://', 'http://a/b', 'x://a:1', 'http://[::1]:2',
    '://a'].map(o => `origin = ${o}\n`).join(''),
  'proxies': ['unix', '1.2.3.4,', ',', '::1, x', '1.2.3.4:5'
  ].map(p => `trust-proxy = ${p}\n`).join(''),
  'many-listeners': 'listen = 1\n'.repeat(9),
  'many-hosts': 'host = a.example\n'.repeat(17),
  'long-texts': ('www = /' + 'x'.repeat(900) + '\n').repeat(5),
  'tls-without-cert': 'tls-listen = 443\n',
  'too-little-memory': 'max-message = 1M\nmessage-memory = 2097151\n',
  'pings': 'ping-interval = 50\ndead-after = 50\n',
  'controls': 'www = \x1b[2J\nlog-level = a\x00b\nx\x7f = 1\n'
})

// ----- tokens ------------------------------------------------------------------------

const hash = text => crypto.createHash('sha256').update(text).digest('hex')

put('tokens', {
  'three': `# ours
${hash('one')} read ws/*
${hash('one')} write ws/team/*/notes

${hash('two').toUpperCase()} admin *\r
`,
  'docs': `${hash('three')} write doc/a*b*c\t\n`,
  'no-newline': `${hash('one')} read *`,
  'words': `${hash('one')}\n${hash('one')} read\n${hash('one')} rule *\n` +
    `${hash('one')} read notes\n${hash('one')} read * *\n`,
  'hashes': `${hash('one')}0 read *\n${hash('one').slice(1)} read *\nx read *\n` +
    `g${hash('one').slice(1)} read *\n`,
  'zero-hash': '0'.repeat(64) + ' admin *\n',
  'nul': `${hash('one')} read ws/\0a\n`,
  'longest': `${hash('one')} read ws/${'x'.repeat(129)}\n` +
    `${hash('one')} read ws/${'x'.repeat(130)}\n`,
  'stars': `${hash('one')} read ws/${'*a'.repeat(60)}b\n`,
  'many': `${hash('one')} read *\n`.repeat(45)
})

// ----- events: see the head of fuzz_frames.c --------------------------------------------

const event = (kind, client, how) => Buffer.from([how << 5 | client << 3 | kind])
const connect = (client, how = 1) => event(0, client, how)
const raw = (client, bytes, step = 0) => Buffer.concat([
  event(1, client, step), Buffer.from([Buffer.byteLength(bytes, 'latin1')]),
  Buffer.from(bytes, 'latin1')])
const frame = (client, first, shape) => Buffer.concat([
  event(2, client, 0), Buffer.from([first, shape])])
const small = (client, power) => event(3, client, power)
const time = how => event(4, 0, how)
const end = (client, how = 0) => event(5, client, how)
const window = (client, how) => event(6, client, how)
const fail = how => event(7, 0, how)
const turn = time(0)
const list = (how, ...events) => Buffer.concat([Buffer.from([how]), ...events])
// accepted, answered, heard
const open = (client, how) => Buffer.concat([connect(client, how), turn, turn, turn])
const join2 = [connect(0), open(1)]
const times = (n, ...events) => Array(n).fill(Buffer.concat(events))

put('frames', {
  'exchange': list(0, ...join2, frame(0, 0x81, 3), frame(1, 0x82, 8), turn),
  'echo': list(0, open(0, 2), frame(0, 0x81, 3), turn),
  'history': list(0, open(0), small(0, 4), turn, open(1, 2)),
  'two-rooms': list(0, connect(0, 1), open(1, 3), small(0, 2), small(1, 2), turn),
  'behind-the-head': list(0, open(0), open(1, 4)),
  'http': list(0, open(0, 5), open(1, 6), open(2, 7)),
  'http-then-upgrade': list(0, open(0, 5),
    raw(0, 'GET /ws/a HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n'), turn,
    raw(0, 'Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n' + key + '\r\n'), turn),
  'slow-head': list(0, connect(0, 0), raw(0, 'GET / HT'), turn, time(6), time(5)),
  'head-of-lf': list(0, connect(0, 0), raw(0, 'GET / HTTP/1.1\n'), turn),
  'pipelined': list(0, connect(0, 5), raw(0, 'GET / HTTP/1.1\r\nHost: a\r\n\r\nGET '), turn,
    raw(0, '/x HTTP/1.1\r\nHost: a\r\n\r\n'), turn),
  'fragments': list(0, ...join2, frame(0, 0x01, 3), frame(0, 0x89, 4), turn,
    frame(0, 0x00, 0), frame(0, 0x80, 8), turn),
  'byte-by-byte': list(0, ...join2,
    ...[...'\x81\x83\0\0\0\0abc\x89\x80\0\0\0\0'].map(b => raw(0, b, 1))),
  'big-in-ring': list(0, ...join2, frame(0, 0x82, 10), turn, turn),
  'block': list(0, ...join2, frame(0, 0x82, 11), turn, frame(0, 0x82, 12), turn, turn, turn),
  'block-unread': list(0, ...join2, open(2), window(1, 3),
    ...times(4, frame(0, 0x82, 12), turn, turn), end(1), turn, window(1, 7), turn),
  'too-big': list(0, ...join2, frame(0, 0x82, 15), turn, turn),
  'text': list(0, ...join2, frame(0, 0x81, 0x13), turn, frame(1, 0x81, 0x12), turn),
  'not-utf8': list(0, ...join2, raw(0, '\x81\x83\0\0\0\0a\xff'), turn),
  'no-mask': list(0, ...join2, raw(0, '\x81\x01x'), turn, turn),
  'reserved': list(0, ...join2, frame(0, 0xc1, 1), turn, frame(1, 0x83, 1), turn),
  'long-ping': list(0, ...join2, frame(0, 0x89, 5), turn),
  'pings-unread': list(0, ...join2, window(0, 0), ...times(5, frame(0, 0x89, 4), turn),
    frame(1, 0x81, 3), turn, window(0, 2), turn, window(0, 3), turn, window(0, 7), turn),
  'close': list(0, ...join2, raw(0, '\x88\x82\0\0\0\0\x03\xe8'), turn, end(0), turn),
  'close-empty': list(0, ...join2, frame(0, 0x88, 0), turn, frame(1, 0x88, 1), turn),
  'gone-in-frame': list(0, ...join2, raw(0, '\x82\xfe\x10\0\0\0\0\0half'), turn, end(0), turn),
  'reset': list(0, ...join2, small(1, 3), end(0, 1), turn, turn),
  'overtaken': list(0, ...join2, open(2), window(1, 2),
    ...times(8, frame(0, 0x82, 10), turn), time(5), window(1, 7), turn),
  'overtaken-between-frames': list(0, ...join2, open(2), window(1, 0),
    ...times(8, frame(0, 0x82, 10), turn), time(5), window(1, 7), turn),
  'slow-majority': list(0, ...join2, window(1, 1),
    ...times(6, frame(0, 0x82, 9), small(0, 7), turn, window(1, 4), turn, window(1, 1)),
    time(3), window(1, 7), turn),
  'coalesce': list(1, ...join2, small(0, 1), turn, small(0, 1), turn, time(2), turn, time(3)),
  'coalesce-and-leave': list(9, open(0), small(0, 0), turn, small(0, 0), turn,
    end(0, 1), turn, open(1, 3)),
  'rates': list(2, ...join2, small(0, 5), turn, time(4), time(4), time(5)),
  'rates-http': list(2, connect(0, 5), ...times(8,
    raw(0, 'GET / HTTP/1.1\r\nHost: a\r\n\r\n'), turn), time(4), turn),
  'per-ip': list(4, connect(0, 5), connect(1, 5), open(2, 5), turn, time(5)),
  'too-many': list(0, connect(0), connect(1), connect(2), open(3), turn,
    end(0), turn, open(3)),
  'no-descriptors': list(0, connect(0), fail(0), turn, turn, time(4), turn),
  'dry-receivers': list(8, ...join2, raw(0, '\x82\x85\0\0\0\0ab'), turn, frame(1, 0x82, 3),
    turn, time(5), turn, time(5), turn),
  'dry-chunks': list(0, ...join2, open(2), ...times(2, frame(0, 0x02, 14),
    frame(1, 0x02, 14), frame(2, 0x02, 14), turn, turn), time(5), time(6), turn),
  'dry-requests': list(8, connect(0, 0), raw(0, 'GET'), turn, open(1, 5), time(5),
    turn, time(6), turn),
  'dry-rooms': list(8, open(0, 1), open(1, 3), end(0), turn, open(2, 3)),
  'pinged': list(0, ...join2, time(7), turn, frame(0, 0x8a, 0), turn, time(7), turn),
  'pinged-unread': list(0, ...join2, window(0, 0), time(7), turn, time(7), turn),
  'flaky': list(0, ...join2, fail(1), small(0, 3), turn, fail(2), small(1, 3), turn, turn),
  'reload': list(0, ...join2, fail(3), turn, small(0, 1), turn),
  'stop': list(0, ...join2, small(0, 3), fail(4), turn, frame(0, 0x88, 0), turn, time(5)),
  'stop-unread': list(0, ...join2, window(1, 0), small(0, 3), turn, fail(4), turn, time(4), turn),
  'stop-without-receivers': list(8, ...join2, raw(0, '\x82\x85\0\0\0\0ab'), turn, fail(4), turn,
    raw(1, 'x'), turn),
  'stop-in-debt': list(2, ...join2, small(0, 5), turn, fail(4), turn, small(0, 1), turn),
  'burst': list(0, ...join2, ...times(3, small(0, 7)), small(1, 6), turn, turn, small(0, 7), turn),
  'stop-in-frame': list(0, ...join2, raw(0, '\x82\x85\0\0\0\0ab'), turn, fail(4), turn,
    raw(0, 'cde'), turn, raw(0, '\x88\x80\0\0\0\0'), turn)
})
