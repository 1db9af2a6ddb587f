// SPDX-License-Identifier: MIT
// Goal: over TLS everything is as without it, for OpenSSL and for Node; a
// handshake never keeps anybody waiting, whoever stalls one is gone by the
// deadline; and a new certificate takes over without dropping anyone.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import crypto, { X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import https from 'node:https';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import tls from 'node:tls';
import WebSocket from 'ws';
import { OP, SLOW, connect, frame, handshake, open } from './lib/raw.js';
import { BINARY, makeCertificate, startServer, temporaryFolder } from './lib/server.js';

const VERSION = spawnSync(BINARY, ['--version'], { encoding: 'utf8' }).stdout ?? '';
const HAS_13 = /TLS [^\n]*1\.3/.test(VERSION);
const GET = 'GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n';

const server = await startServer({ after }, { tls: true });
const certificate = server.certificate;

// Where to connect with what options of tls.connect.
const secure = (at = server, options = {}) => ({
    port: at.tlsPort, sockets: at.sockets,
    tls: { ca: at.certificate?.ca ?? certificate.ca, servername: 'localhost', ...options },
});
// The port for TLS, spoken to without it.
const bare = (at = server) => ({ port: at.tlsPort, sockets: at.sockets });

async function echoes(peer, text = 'are you there?') {
    await peer.text(text);
    assert.equal((await peer.message()).text, text);
}

async function plainIsWell(at = server) {
    await echoes(await at.connect('/ws/plain?echo=1'));
}

// Runs `openssl s_client` with a request on its standard input; everything it
// said.
async function sClient(words, { at = server, input = GET } = {}) {
    const child = spawn('openssl', ['s_client', '-connect', `127.0.0.1:${at.tlsPort}`,
        '-servername', 'localhost', ...words], { stdio: 'pipe' });
    let said = '';
    child.stdout.on('data', (chunk) => (said += chunk));
    child.stderr.on('data', (chunk) => (said += chunk));
    child.stdin.on('error', () => {});
    if (input !== null)
        child.stdin.write(input);
    const timer = globalThis.setTimeout(() => child.kill(), 8000 * SLOW);
    await once(child, 'close');
    clearTimeout(timer);
    return said;
}

// Waits until the server has closed.
function ended(socket, what) {
    return new Promise((resolve, reject) => {
        const timer = globalThis.setTimeout(() =>
            reject(new Error(`${what}: still open`)), 8000 * SLOW);
        const end = () => resolve(clearTimeout(timer));
        socket.resume().once('close', end).once('end', end);
    });
}

const fingerprint = (pem) => new X509Certificate(pem).fingerprint256;

async function servedFingerprint(at) {
    const socket = await open(secure(at, { rejectUnauthorized: false }));
    const { fingerprint256 } = socket.getPeerCertificate();
    socket.destroy();
    return fingerprint256;
}

// ----- clients -------------------------------------------------------------

test('Node speaks wss to it', async () => {
    const client = new WebSocket(`wss://127.0.0.1:${server.tlsPort}/ws/node?echo=1`,
        { ca: certificate.ca });
    await once(client, 'open');
    client.send('over TLS');
    const [data] = await once(client, 'message');
    assert.equal(data.toString(), 'over TLS');
    client.close(1000);
    assert.equal((await once(client, 'close'))[0], 1000);
});

test('Node speaks https to it and keeps the connection', async () => {
    const agent = new https.Agent({ keepAlive: true, maxSockets: 1, ca: certificate.ca });
    const ports = new Set();
    for (let i = 0; i < 3; i++) {
        const [answer] = await once(https.get(
            { host: '127.0.0.1', port: server.tlsPort, path: '/healthz', agent }), 'response');
        assert.equal(answer.statusCode, 200);
        ports.add(answer.socket.localPort);
        await answer.resume().toArray();
    }
    assert.equal(ports.size, 1);
    agent.destroy();
});

for (const [version, flag, there] of [
    ['TLSv1.2', '-tls1_2', true], ['TLSv1.3', '-tls1_3', HAS_13],
    ['TLSv1.1', '-tls1_1', false], ['TLSv1', '-tls1', false],
])
    test(`OpenSSL ${there ? 'can' : 'cannot'} speak ${version}`, async () => {
        const said = await sClient([flag, '-CAfile', certificate.cert,
            '-cipher', 'DEFAULT@SECLEVEL=0', '-verify_return_error', '-verify_ip', '127.0.0.1']);
        if (!there)
            return assert.doesNotMatch(said, /HTTP\/1\.1 200/);
        assert.match(said, /HTTP\/1\.1 200 OK/, said);
        assert.match(said, new RegExp(`Protocol *: ${version}|New, ${version}`));
        assert.match(said, /Verif(y return code|ication): (0 \(ok\)|OK)/);
    });

test('Old ciphers and renegotiation are refused', async () => {
    for (const cipher of ['NULL', 'RC4', '3DES', 'aNULL', 'EXPORT']) {
        const said = await sClient(['-tls1_2', '-cipher', `${cipher}@SECLEVEL=0`]);
        assert.doesNotMatch(said, /HTTP\/1\.1 200/, cipher);
    }
    const said = await sClient(['-tls1_2', '-legacy_server_connect'], { input: 'R\n' });
    assert.doesNotMatch(said, /HTTP\/1\.1 200/);
    await plainIsWell();
});

test('ALPN chooses http/1.1 if it is offered', async () => {
    for (const [offer, chosen] of [
        [['http/1.1'], 'http/1.1'], [['h2', 'http/1.1'], 'http/1.1'],
        [['http/1.1', 'h2'], 'http/1.1'], [[], false],
    ]) {
        const socket = await open(secure(server, { ALPNProtocols: offer }));
        assert.equal(socket.alpnProtocol, chosen, offer.join());
        socket.destroy();
    }
    const said = await sClient(['-tls1_2', '-alpn', 'h2,http/1.1']);
    assert.match(said, /ALPN protocol: http\/1\.1/);
});

test('An offer of ALPN without http/1.1 gets no HTTP/2', async () => {
    const socket = await open(secure(server, { ALPNProtocols: ['h2'] })).catch((e) => e);
    if (!(socket instanceof Error)) {
        assert.equal(socket.alpnProtocol, false);
        socket.destroy();
    }
});

// ----- resumption ----------------------------------------------------------

test('A session is resumed by its ticket with TLS 1.2', async (t) => {
    const file = path.join(temporaryFolder(t), 'session');
    const first = await sClient(['-tls1_2', '-sess_out', file]);
    assert.match(first, /^New, TLSv1\.2/m);
    assert.match(first, /TLS session ticket/);
    const second = await sClient(['-tls1_2', '-sess_in', file]);
    assert.match(second, /^Reused, TLSv1\.2/m);
    assert.match(second, /HTTP\/1\.1 200 OK/);
});

test('OpenSSL reconnects five times with one session', async () => {
    const said = await sClient(['-tls1_2', '-reconnect']);
    assert.equal(said.match(/^Reused, TLSv1\.2/gm)?.length, 5);
});

test('A session is resumed with TLS 1.3', { skip: !HAS_13 && 'the library has no TLS 1.3' }, async (t) => {
    const file = path.join(temporaryFolder(t), 'session');
    const first = await sClient(['-tls1_3', '-sess_out', file]);
    assert.match(first, /HTTP\/1\.1 200 OK/);
    const second = await sClient(['-tls1_3', '-sess_in', file]);
    assert.match(second, /^Reused, TLSv1\.3/m);
    assert.match(second, /HTTP\/1\.1 200 OK/);
});

test('Node resumes a session, and a ticket that was tampered with is no harm', async () => {
    const options = { maxVersion: 'TLSv1.2' };
    const first = await open(secure(server, options));
    const session = first.getSession(), ticket = first.getTLSTicket();
    assert.equal(first.isSessionReused(), false);
    first.destroy();
    const second = await open(secure(server, { ...options, session }));
    assert.equal(second.isSessionReused(), true);
    second.destroy();
    const spoilt = Buffer.from(session);
    const at = ticket ? spoilt.indexOf(ticket) : -1;
    assert.ok(at >= 0, 'the session holds no ticket');
    spoilt[at + ticket.length - 5] ^= 1;
    const third = await open(secure(server, { ...options, session: spoilt }));
    assert.equal(third.isSessionReused(), false);
    third.destroy();
});

// ----- messages ------------------------------------------------------------

test('Members with and without TLS share a channel', async () => {
    const plain = await server.connect('/ws/mixed');
    const over = await connect(secure(), '/ws/mixed');
    await plain.text('from plain');
    assert.equal((await over.message()).text, 'from plain');
    await over.text('from TLS');
    assert.equal((await plain.message()).text, 'from TLS');
});

test('Messages of every size go both ways', { timeout: 60000 * SLOW }, async () => {
    const over = await connect(secure(), '/ws/sizes');
    const plain = await server.connect('/ws/sizes');
    for (const size of [0, 1, 125, 126, 4000, 4085, 4096, 16383, 16384, 16385, 32768,
        65535, 65536, 300000, 1 << 20]) {
        const data = crypto.randomBytes(size);
        over.binary(data);
        assert.deepEqual((await plain.message()).data, data, `${size} in`);
        plain.binary(data);
        assert.deepEqual((await over.message()).data, data, `${size} out`);
    }
});

test('Two hundred messages in one record, and one in many, arrive', async () => {
    const peer = await connect(secure(), '/ws/records?echo=1');
    const texts = Array.from({ length: 200 }, (_, i) => `message ${i}`);
    await peer.send(texts.map((text) => frame(OP.TEXT, text)));
    assert.deepEqual((await peer.messages(200)).map((m) => m.text), texts);
    await peer.chop(frame(OP.TEXT, 'a byte a record'));
    assert.equal((await peer.message()).text, 'a byte a record');
});

test('Frames in the same record as the head belong to the stream', async () => {
    const peer = await connect(secure(), '/ws/early?echo=1', { with: Buffer.concat(
        Array.from({ length: 30 }, (_, i) => frame(OP.TEXT, `${i}`.padEnd(500)))) });
    const got = await peer.messages(30);
    assert.deepEqual(got.map((m) => parseInt(m.text, 10)),
        Array.from({ length: 30 }, (_, i) => i));
});

test('A member that reads slowly gets every byte in order', { timeout: 60000 * SLOW }, async () => {
    const reader = await connect(secure(), '/ws/slowly');
    const writer = await connect(secure(), '/ws/slowly');
    const messages = Array.from({ length: 60 }, (_, i) => Buffer.alloc(9000, i));
    const got = (async () => {
        for (const [i, want] of messages.entries()) {
            assert.deepEqual((await reader.message()).data, want, `message ${i}`);
            if (i % 10 === 0) {
                reader.pause();
                await setTimeout(30);
                reader.resume();
            }
        }
    })();
    for (const data of messages) {
        await writer.binary(data);
        await setTimeout(5);
    }
    await got;
});

test('The Close handshake works over TLS, and so does a close without one', async () => {
    const polite = await connect(secure(), '/ws/close');
    await polite.close(1000, 'bye');
    assert.equal((await polite.closed()).code, 1000);
    const bad = await connect(secure(), '/ws/close');
    await bad.text('x', { mask: false });
    assert.equal((await bad.closed()).code, 1002);
    const rude = await connect(secure(), '/ws/close');
    rude.socket.destroy();
    await plainIsWell();
});

test('SIGTERM says 1001 over TLS', async (t) => {
    const own = await startServer(t, { tls: certificate });
    const peer = await connect(secure(own), '/ws/x');
    own.signal('SIGTERM');
    assert.equal((await peer.closed()).code, 1001);
    assert.equal((await own.gone).code, 0);
});

// ----- handshakes ----------------------------------------------------------

test('Whoever does not speak TLS is closed and harms nobody', async () => {
    const over = await connect(secure(), '/ws/bystander?echo=1');
    for (const data of [GET, 'SSH-2.0-x\r\n', '\x16\x03\x01\xff\xff', '\x16\x03\x01\0\0',
        '\x80\x2e\x01\0\x02', '\x15\x03\x01\0\x02\x02\x28', '\x17\x03\x03\0\x01x',
        '\0'.repeat(100), '\xff'.repeat(20000)]) {
        const socket = await open(bare());
        socket.write(data, 'latin1');
        if (data.length > 10 && !data.startsWith('\x16'))
            await ended(socket, JSON.stringify(data.slice(0, 20)));
        socket.destroy();
        await echoes(over);
    }
    await plainIsWell();
});

// What a client says first, without saying it to anybody.
async function clientHello() {
    const { Duplex } = await import('node:stream');
    let said;
    const wire = new Duplex({ read() {}, write(chunk, _, done) {
        said?.(chunk);
        said = null;
        done();
    } });
    const hello = new Promise((resolve) => (said = resolve));
    tls.connect({ socket: wire, servername: 'localhost' }).on('error', () => {});
    return hello;
}

test('TLS on the plain port is refused as bad HTTP', async () => {
    const socket = await open(server);
    socket.write(await clientHello());
    const [answer] = await once(socket, 'data');
    assert.match(answer.toString('latin1'), /^HTTP\/1\.1 400 /);
    socket.destroy();
});

test('A handshake cut short at every byte does no harm', async (t) => {
    const own = await startServer(t,
        { tls: certificate, args: ['--max-tls', '200'] });
    const hello = await clientHello();
    for (let at = 0; at <= hello.length; at += 7) {
        const socket = await open(bare(own));
        await new Promise((done) => socket.write(hello.subarray(0, at), done));
        if (at % 2)
            socket.resetAndDestroy();
        else
            socket.destroy();
    }
    await echoes(await connect(secure(own), '/ws/x?echo=1'));
});

test('A hello byte by byte is a hello', async () => {
    const socket = await open(bare());
    for (const byte of await clientHello()) {
        socket.write(Buffer.of(byte));
        await new Promise(setImmediate);
    }
    const [answer] = await once(socket, 'data');
    assert.equal(answer[0], 22, 'that is no handshake record');
    socket.destroy();
});

test('A handshake that stalls ends by the deadline', async (t) => {
    const own = await startServer(t,
        { tls: certificate, args: ['--request-timeout', '1'] });
    const hello = await clientHello();
    const started = Date.now();
    await Promise.all([0, 1, 5, 20, hello.length - 1, hello.length].map(async (at) => {
        const socket = await open(bare(own));
        socket.write(hello.subarray(0, at));
        await ended(socket, `stalled at ${at}`);
        const took = Date.now() - started;
        assert.ok(took > 700 && took < 6000 * SLOW, `stalled at ${at}: ${took} ms`);
        socket.destroy();
    }));
    await echoes(await connect(secure(own), '/ws/x?echo=1'));
});

test('A head that does not come after the handshake ends by the deadline', async (t) => {
    const own = await startServer(t,
        { tls: certificate, args: ['--request-timeout', '1'] });
    const { status } = await handshake(secure(own), '', { head: 'GET /hea' });
    assert.equal(status, 408);
});

test('Stalled handshakes hold up others no longer than their deadline', async (t) => {
    const own = await startServer(t, { tls: certificate,
        args: ['--request-timeout', '2', '--max-handshakes', '2'] });
    const hello = await clientHello();
    for (let i = 0; i < 2; i++)
        (await open(bare(own))).resume().write(hello.subarray(0, 30));
    await setTimeout(200);
    const started = Date.now();
    const third = connect(secure(own), '/ws/x?echo=1');
    await plainIsWell(own);
    assert.ok(Date.now() - started < 1000 * SLOW, 'a plain client had to wait');
    await echoes(await third);
    const took = Date.now() - started;
    assert.ok(took > 1000, `the third did not wait: ${took} ms`);
    assert.ok(took < 5000 * SLOW, `the third waited ${took} ms`);
});

test('One TLS client too many is refused, and then there is room again', async (t) => {
    const own = await startServer(t, { tls: certificate, args: ['--max-tls', '2'] });
    const inside = [await connect(secure(own), '/ws/x?echo=1'),
        await connect(secure(own), '/ws/x')];
    await assert.rejects(connect(secure(own), '/ws/x', { ms: 1500 }));
    await plainIsWell(own);
    await echoes(inside[0]);
    await inside[1].close(1000);
    await inside[1].closed();
    for (const until = Date.now() + 5000 * SLOW; ;) {
        const next = await connect(secure(own), '/ws/y?echo=1').catch(() => null);
        if (next) {
            await echoes(next);
            break;
        }
        assert.ok(Date.now() < until, 'there is no room');
        await setTimeout(100);
    }
});

test('Twenty handshakes at once all succeed while a plain channel flows', { timeout: 60000 * SLOW }, async () => {
    const [sender, member] = await Promise.all([1, 2].map(() => server.connect('/ws/flow')));
    let busy = true, slowest = 0, rounds = 0;
    const crowd = Promise.all(Array.from({ length: 20 }, () =>
        connect(secure(), '/ws/crowd'))).finally(() => (busy = false));
    while (busy) {
        const sent = performance.now();
        await sender.text(`${rounds}`);
        assert.equal((await member.message()).text, `${rounds++}`);
        slowest = Math.max(slowest, performance.now() - sent);
    }
    const peers = await crowd;
    assert.ok(rounds > 3, `${rounds} messages went round`);
    assert.ok(slowest < 1000 * SLOW, `a message took ${slowest} ms`);
    await peers[0].text('all in');
    for (const peer of peers.slice(1))
        assert.equal((await peer.message()).text, 'all in');
});

test('Peers that leave in the middle of their handshakes leave nothing behind', { timeout: 60000 * SLOW }, async (t) => {
    const own = await startServer(t,
        { tls: certificate, args: ['--max-tls', '200'] });
    const hello = await clientHello();
    for (let i = 0; i < 60; i++) {
        const socket = await open(bare(own));
        socket.write(hello);
        if (i % 4)
            await setTimeout(i % 4 - 1); // at each of its steps
        if (i % 2)
            socket.resetAndDestroy();
        else
            socket.destroy();
    }
    await own.waitForMetric('collabd_clients', 1); // who asks
    await own.waitForMetric('collabd_memory_used_bytes{pool="tls"}', 0);
    await echoes(await connect(secure(own), '/ws/x?echo=1'));
});

test('Reloads during handshakes hurt none', { timeout: 60000 * SLOW }, async (t) => {
    const own = await startServer(t, { tls: certificate,
        args: ['--max-tls', '64', '--max-handshakes', '20'] });
    let reloads = 0, busy = true;
    const crowd = Promise.all(Array.from({ length: 40 }, () =>
        connect(secure(own), '/ws/crowd'))).finally(() => (busy = false));
    for (; busy; reloads++) {
        own.signal('SIGHUP');
        await setTimeout(5);
    }
    const peers = await crowd;
    assert.ok(reloads > 3, `${reloads} reloads`);
    await peers[0].text('all in');
    for (const peer of peers.slice(1))
        assert.equal((await peer.message()).text, 'all in');
});

test('SIGTERM during handshakes ends the server in time', { timeout: 60000 * SLOW }, async (t) => {
    const own = await startServer(t, { tls: certificate });
    const crowd = Promise.allSettled(Array.from({ length: 20 }, () =>
        connect(secure(own), '/ws/crowd')));
    await own.waitForMetric('collabd_tls_handshakes_total', (n) => n > 0);
    own.signal('SIGTERM');
    assert.equal((await own.gone).code, 0);
    await crowd;
});

// ----- certificates --------------------------------------------------------

test('--make-cert makes what --tls-cert takes and its CA vouches for', async (t) => {
    const dir = path.join(temporaryFolder(t), 'tls');
    const made = spawnSync(BINARY, ['--make-cert', dir], { encoding: 'utf8' });
    assert.equal(made.status, 0, made.stderr);
    const [cert, key, ca] = ['cert.pem', 'key.pem', 'ca.pem'].map((f) => path.join(dir, f));
    const own = await startServer(t, { tls: { cert, key, ca: fs.readFileSync(ca, 'utf8') } });
    await echoes(await connect(secure(own), '/ws/x?echo=1'));
    const said = await sClient(['-CAfile', ca, '-verify_return_error',
        '-verify_hostname', 'localhost'], { at: own });
    assert.match(said, /HTTP\/1\.1 200 OK/);
});

// Copies of two certificates that a server is told about in turn.
function certificates(t) {
    const [one, two] = [makeCertificate(t), makeCertificate(t)];
    const dir = temporaryFolder(t);
    const files = { cert: path.join(dir, 'cert.pem'), key: path.join(dir, 'key.pem') };
    const use = ({ cert, key }) => {
        fs.copyFileSync(cert, files.cert);
        fs.copyFileSync(key, files.key);
    };
    use(one);
    return { one, two, use, files: { ...files, ca: one.ca + two.ca } };
}

async function becomes(at, wanted) {
    for (const until = Date.now() + 4000 * SLOW; ;) {
        if (await servedFingerprint(at) === wanted)
            return;
        assert.ok(Date.now() < until, 'the new certificate is not served');
        await setTimeout(20);
    }
}

test('After SIGHUP newcomers see the new certificate, and nobody is dropped', async (t) => {
    const { one, two, use, files } = certificates(t);
    const own = await startServer(t, { tls: files });
    const old = await connect(secure(own), '/ws/x?echo=1');
    assert.equal(old.socket.getPeerCertificate().fingerprint256, fingerprint(one.ca));
    use(two);
    assert.equal(await servedFingerprint(own), fingerprint(one.ca), 'before SIGHUP');
    own.signal('SIGHUP');
    await becomes(own, fingerprint(two.ca));
    await echoes(old);
    await old.binary(crypto.randomBytes(200000));
    assert.equal((await old.message()).data.length, 200000);
    await echoes(await connect(secure(own), '/ws/x?echo=1'));
});

test('A handshake that has begun ends with the certificate it began with', async (t) => {
    const { two, use, files } = certificates(t);
    const own = await startServer(t, { tls: files });
    const hello = await clientHello();
    const begun = await open(bare(own));
    begun.on('data', () => {}).write(hello);
    await setTimeout(200);
    use(two);
    own.signal('SIGHUP');
    await becomes(own, fingerprint(two.ca));
    begun.destroy();
    await echoes(await connect(secure(own), '/ws/x?echo=1'));
});

test('Twelve new certificates in a row drop nobody', async (t) => {
    const { one, two, use, files } = certificates(t);
    const own = await startServer(t, { tls: files });
    const peers = [];
    for (let i = 0; i < 12; i++) {
        peers.push(await connect(secure(own), '/ws/generations'));
        const next = i % 2 ? one : two;
        use(next);
        own.signal('SIGHUP');
        // With too many old ones in use a reload may be refused, and says so.
        await Promise.race([becomes(own, fingerprint(next.ca)),
            own.waitForLog(/^(error|warning): .*(generation|certificate|reload)/i)]);
    }
    await peers[0].text('all here');
    for (const peer of peers.slice(1))
        assert.equal((await peer.message()).text, 'all here');
});

test('A broken new certificate keeps the old one and says so', async (t) => {
    const { one, two, use, files } = certificates(t);
    const own = await startServer(t, { tls: files });
    const peer = await connect(secure(own), '/ws/x?echo=1');
    const broken = {
        'garbage instead of a certificate': () => fs.writeFileSync(files.cert, 'garbage\n'),
        'garbage instead of a key': () => fs.writeFileSync(files.key, 'garbage\n'),
        'an empty certificate': () => fs.writeFileSync(files.cert, ''),
        'half a certificate': () => fs.writeFileSync(files.cert, two.ca.slice(0, 300)),
        'the key of another certificate': () => fs.copyFileSync(two.key, files.key),
        'no certificate': () => fs.unlinkSync(files.cert),
        'no key': () => fs.unlinkSync(files.key),
        'a folder': () => {
            fs.unlinkSync(files.key);
            fs.mkdirSync(files.key);
        },
    };
    for (const [what, spoil] of Object.entries(broken))
        await t.test(what, async () => {
            use(one);
            spoil();
            const said = () => own.log.filter((l) => /^error: .*(cert|key)\.pem/.test(l)).length;
            const before = said();
            own.signal('SIGHUP');
            for (const until = Date.now() + 4000 * SLOW; said() === before;) {
                assert.ok(Date.now() < until, `nothing was said; ${own.describe()}`);
                await setTimeout(10);
            }
            assert.equal(await servedFingerprint(own), fingerprint(one.ca));
            await echoes(peer);
        });
    fs.rmdirSync(files.key);
    use(two);
    own.signal('SIGHUP');
    await becomes(own, fingerprint(two.ca));
});

test('A broken certificate stops the start and is named', (t) => {
    const { files, two } = certificates(t);
    const check = () => spawnSync(BINARY, ['--check', '--tls-listen', '127.0.0.1:0',
        '--tls-cert', files.cert, '--tls-key', files.key], { encoding: 'utf8' });
    assert.equal(check().status, 0, check().stderr);
    fs.copyFileSync(two.key, files.key);
    assert.ok(check().status > 0);
    assert.match(check().stderr, /^error: .*(cert|key)\.pem/m);
    fs.writeFileSync(files.cert, 'garbage\n');
    assert.ok(check().status > 0);
    assert.match(check().stderr, /^error: .*cert\.pem/m);
});
