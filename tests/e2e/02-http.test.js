// SPDX-License-Identifier: MIT
// Goal: without WebSocket, collabd is a strict HTTP/1.1 server: it keeps
// connections alive, answers pipelined requests in order, says in one line what
// was wrong with a request, never takes a body for a request, and lets nobody
// hold anything by being slow.

import assert from 'node:assert/strict';
import { readdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { OP, SLOW, frame, open, upgradeRequest } from './lib/raw.js';
import { startServer, temporaryFolder } from './lib/server.js';

// ----- a bare HTTP client --------------------------------------------------

class Client {
    #got = Buffer.alloc(0);
    #wake = () => {};
    ended = false;

    static async to(server) {
        return new Client(await open(server));
    }

    constructor(socket) {
        this.socket = socket;
        socket.on('data', (chunk) => {
            this.#got = Buffer.concat([this.#got, chunk]);
            this.#wake();
        });
        const end = () => {
            this.ended = true;
            this.#wake();
        };
        socket.on('end', end).on('close', end);
    }

    send(data) {
        return new Promise((done) => this.socket.write(data, 'latin1', done));
    }

    get #start() {
        return this.#got.toString('latin1', 0, 200);
    }

    // Waits until `ready` gives something that is not undefined.
    async #until(ready, what, ms) {
        for (const until = Date.now() + ms; ;) {
            const result = ready();
            if (result !== undefined)
                return result;
            const left = until - Date.now();
            if (left <= 0)
                assert.fail(`${what} within ${ms} ms, got "${this.#start}"`);
            await Promise.race([
                new Promise((resolve) => (this.#wake = resolve)),
                setTimeout(left, undefined, { ref: false }),
            ]);
        }
    }

    // The next answer: { status, version, headers, body }. `head`: the answer
    // to a HEAD has no body whatever its fields say.
    answer({ head = false, ms = 5000 * SLOW } = {}) {
        return this.#until(() => {
            const end = this.#got.indexOf('\r\n\r\n');
            if (end < 0) {
                if (this.ended)
                    assert.fail(
                        `the stream ended before an answer, got "${this.#start}"`);
                return undefined;
            }
            const [first, ...lines] = this.#got.toString('latin1', 0, end)
                .split('\r\n');
            const status = first.match(/^HTTP\/1\.1 (\d{3}) [\x20-\x7e]+$/);
            assert.ok(status, `the status line is "${first}"`);
            const headers = {};
            for (const line of lines) {
                const field = line.match(/^([!#$%&'*+.^`|~\w-]+): ?(.*)$/);
                assert.ok(field, `a header line is "${line}"`);
                const name = field[1].toLowerCase();
                const list = name === 'connection' && headers[name];
                assert.ok(list || !(name in headers), `${name} came twice`);
                headers[name] = list ? `${list}, ${field[2]}` : field[2];
            }
            const empty = head || ['101', '204', '304'].includes(status[1]);
            assert.ok(empty || headers['content-length'], 'no Content-Length');
            const size = empty ? 0 : Number(headers['content-length']);
            if (this.#got.length < end + 4 + size) {
                assert.ok(!this.ended, 'the stream ended inside a body');
                return undefined;
            }
            const body = this.#got.toString('utf8', end + 4, end + 4 + size);
            this.#got = this.#got.subarray(end + 4 + size);
            return { status: Number(status[1]), headers, body };
        }, 'no answer', ms);
    }

    // Asserts that the server closes, having sent nothing but `bytes`.
    async closes({ ms = 2000 * SLOW, bytes = '' } = {}) {
        await this.#until(() => this.ended || undefined, 'no end', ms);
        assert.equal(this.#start, bytes);
        this.socket.destroy();
    }

    async staysOpen(ms = 150 * SLOW) {
        await setTimeout(ms);
        assert.ok(!this.ended, 'the server closed the connection');
        assert.equal(this.#start, '', 'more bytes came');
    }
}

const request = (line, ...fields) =>
    [line, 'Host: localhost', ...fields, '', ''].join('\r\n');

const GET = request('GET /healthz HTTP/1.1');

const says = (headers, option) => (headers.connection ?? '').toLowerCase()
    .split(/\s*,\s*/).includes(option);

function assertOneLine({ status, headers, body }) {
    assert.match(body, /^[^\n\r]{10,300}\n$/, `the body of ${status}`);
    assert.match(headers['content-type'], /^text\/plain\b/);
}

// ----- connections ---------------------------------------------------------

const www = temporaryFolder({ after });
writeFileSync(path.join(www, 'index.html'), '<title>front</title>\n');
writeFileSync(path.join(www, 'big.bin'), Buffer.alloc(8 << 20, 7));
const server = await startServer({ after }, { args: ['--www', www] });

test('A connection is kept alive', async () => {
    const client = await Client.to(server);
    for (let i = 0; i < 5; i++) {
        await client.send(GET);
        const { status, headers } = await client.answer();
        assert.equal(status, 200);
        assert.ok(!says(headers, 'close'));
    }
    await client.staysOpen();
    client.socket.destroy();
});

test('Pipelined requests are answered in order', async () => {
    const client = await Client.to(server);
    const paths = ['/healthz', '/nothing', '/index.html', '/nothing', '/healthz'];
    await client.send(paths.map((p) => request(`GET ${p} HTTP/1.1`)).join(''));
    const statuses = [];
    for (let i = 0; i < paths.length; i++)
        statuses.push((await client.answer()).status);
    assert.deepEqual(statuses, [200, 404, 200, 404, 200]);
    await client.staysOpen();
    client.socket.destroy();
});

test('Three hundred pipelined requests, cut anywhere, are all answered', async () => {
    const client = await Client.to(server);
    const all = Array.from({ length: 300 }, (_, i) =>
        request(`GET ${i % 3 ? '/index.html' : '/nothing'} HTTP/1.1`,
            `X-Fill: ${'x'.repeat(i % 97)}`)).join('');
    for (let at = 0; at < all.length; at += 4001)
        client.send(all.slice(at, at + 4001));
    for (let i = 0; i < 300; i++)
        assert.equal((await client.answer()).status, i % 3 ? 200 : 404, `${i}`);
    client.socket.destroy();
});

test('A request byte by byte is a request', async () => {
    const client = await Client.to(server);
    for (const byte of GET)
        await client.send(byte);
    assert.equal((await client.answer()).status, 200);
    client.socket.destroy();
});

test('"Connection: close" is granted, in any case and among others', async () => {
    for (const value of ['close', 'Close', 'foo, CLOSE', ',close,']) {
        const client = await Client.to(server);
        await client.send(request('GET /healthz HTTP/1.1', `Connection: ${value}`));
        const { status, headers } = await client.answer();
        assert.equal(status, 200);
        assert.ok(says(headers, 'close'));
        await client.closes();
    }
});

test('What follows a request with "Connection: close" is not answered', async () => {
    const client = await Client.to(server);
    await client.send(request('GET /healthz HTTP/1.1', 'Connection: close') + GET);
    await client.answer();
    await client.closes();
});

test('HTTP/1.0 closes by default', async () => {
    const client = await Client.to(server);
    await client.send(request('GET /healthz HTTP/1.0'));
    assert.equal((await client.answer()).status, 200);
    await client.closes();
});

test('HTTP/1.0 needs no Host', async () => {
    const client = await Client.to(server);
    await client.send('GET /healthz HTTP/1.0\r\n\r\n');
    assert.equal((await client.answer()).status, 200);
    await client.closes();
});

test('HTTP/1.0 with "Connection: keep-alive" is either told so or closed', async () => {
    const client = await Client.to(server);
    await client.send(request('GET /healthz HTTP/1.0', 'Connection: keep-alive'));
    const { headers } = await client.answer();
    if (says(headers, 'keep-alive')) {
        await client.send(request('GET /healthz HTTP/1.0'));
        await client.answer();
    }
    await client.closes();
});

test('A client that sends FIN behind its requests gets all answers', async () => {
    const client = await Client.to(server);
    await client.send(GET + GET);
    client.socket.end();
    assert.equal((await client.answer()).status, 200);
    assert.equal((await client.answer()).status, 200);
    await client.closes();
});

test('HEAD has the fields of GET and no body', async () => {
    for (const where of ['/index.html', '/big.bin', '/nothing', '/index.html?x=1']) {
        const client = await Client.to(server);
        await client.send(request(`GET ${where} HTTP/1.1`));
        const get = await client.answer();
        await client.send(request(`HEAD ${where} HTTP/1.1`) + GET);
        const head = await client.answer({ head: true });
        assert.equal(head.status, get.status);
        for (const name of ['content-length', 'content-type', 'etag'])
            assert.equal(head.headers[name], get.headers[name], name);
        assert.equal((await client.answer()).status, 200);
        client.socket.destroy();
    }
});

test('HEAD of /healthz and /metrics has no body', async () => {
    const client = await Client.to(server);
    for (const where of ['/healthz', '/metrics']) {
        await client.send(request(`HEAD ${where} HTTP/1.1`));
        const { status, headers } = await client.answer({ head: true });
        assert.equal(status, 200);
        assert.ok(Number(headers['content-length']) > 0);
        await client.staysOpen();
    }
    client.socket.destroy();
});

test('Every answer has a date and forbids guessing its type', async () => {
    for (const where of ['/healthz', '/metrics', '/nothing', '/index.html']) {
        const { headers } = await server.get(where);
        assert.ok(Math.abs(Date.parse(headers.date) - Date.now()) < 5000,
            `${where}: ${headers.date}`);
        assert.match(headers.date, /^\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT$/);
        assert.equal(headers['x-content-type-options'], 'nosniff', where);
    }
});

// ----- bodies --------------------------------------------------------------

// [what, request, statuses]: each is answered once and the connection closed,
// so that what follows is never taken for another request.
const SMUGGLED = GET;
const BODIES = [
    ['POST with a length', request('POST /healthz HTTP/1.1',
        `Content-Length: ${SMUGGLED.length}`), [405]],
    ['PUT with a length', request('PUT /index.html HTTP/1.1',
        `Content-Length: ${SMUGGLED.length}`), [405]],
    ['POST in chunks', request('POST /healthz HTTP/1.1',
        'Transfer-Encoding: chunked'), [405]],
    ['POST that expects 100-continue', request('POST /healthz HTTP/1.1',
        'Content-Length: 5', 'Expect: 100-continue'), [405]],
    ['GET with a large body', request('GET /healthz HTTP/1.1',
        'Content-Length: 100000'), [413]],
    ['GET with a body beyond any number', request('GET /healthz HTTP/1.1',
        'Content-Length: 99999999999999999999999'), [400, 413]],
    ['a Transfer-Encoding that is not known', request('POST /healthz HTTP/1.1',
        'Transfer-Encoding: gzip, chunked'), [501]],
    ['GET with a Transfer-Encoding that is not known',
        request('GET /healthz HTTP/1.1', 'Transfer-Encoding: sdch'), [400, 501]],
    ['a Transfer-Encoding that does not end in chunked',
        request('POST /healthz HTTP/1.1', 'Transfer-Encoding: chunked, gzip'),
        [400, 501]],
    ['chunked twice', request('POST /healthz HTTP/1.1',
        'Transfer-Encoding: chunked, chunked'), [400, 501]],
    ['an empty Transfer-Encoding', request('POST /healthz HTTP/1.1',
        'Transfer-Encoding:'), [400, 501]],
    ['both a length and a Transfer-Encoding', request('POST /healthz HTTP/1.1',
        'Content-Length: 5', 'Transfer-Encoding: chunked'), [400]],
    ['the same, the other way round', request('GET /healthz HTTP/1.1',
        'Transfer-Encoding: chunked', 'Content-Length: 0'), [400]],
    ['a Transfer-Encoding in HTTP/1.0', request('POST /healthz HTTP/1.0',
        'Transfer-Encoding: chunked'), [400, 405, 501]],
    ...['+5', '-1', '5x', 'x', '', '0x5', '5 5', '5, 6', '1e3', '5.0'].map((length) =>
        [`the Content-Length "${length}"`, request('GET /healthz HTTP/1.1',
            `Content-Length: ${length}`), [400]]),
    ['two different lengths', request('GET /healthz HTTP/1.1',
        'Content-Length: 5', 'Content-Length: 6'), [400]],
];

for (const [what, head, statuses] of BODIES)
    test(`A request with ${what} gets ${statuses.join(' or ')} and is the last`, async () => {
        const client = await Client.to(server);
        await client.send(head + SMUGGLED + SMUGGLED);
        const answer = await client.answer();
        assert.ok(statuses.includes(answer.status), `got ${answer.status}`);
        assert.ok(says(answer.headers, 'close'));
        assertOneLine(answer);
        await client.closes();
    });

test('A small body of a GET is never taken for a request', async () => {
    const client = await Client.to(server);
    await client.send(request('GET /healthz HTTP/1.1',
        `Content-Length: ${SMUGGLED.length}`) + SMUGGLED);
    const { status, headers } = await client.answer();
    assert.ok([200, 413].includes(status), `got ${status}`);
    if (says(headers, 'close'))
        await client.closes();
    else
        await client.staysOpen();
    client.socket.destroy();
});

test('A refusal arrives although its body still does', async () => {
    const client = await Client.to(server);
    client.send(request('POST /healthz HTTP/1.1', 'Content-Length: 4000000'));
    client.send('x'.repeat(4000000));
    assert.equal((await client.answer()).status, 405);
    await client.closes({ ms: 5000 * SLOW });
});

test('A 405 lists what is allowed', async () => {
    for (const [method, where] of [['POST', '/healthz'], ['DELETE', '/metrics'],
        ['PUT', '/index.html'], ['PATCH', '/ws/x']]) {
        const answer = await server.get(where, {}, method);
        assert.equal(answer.status, 405, `${method} ${where}`);
        assert.match(answer.headers.allow, /\bGET\b/);
    }
});

// ----- sizes ---------------------------------------------------------------

test('A target of 2048 bytes is served, one of 2049 gets 414', async () => {
    const target = '/healthz?'.padEnd(2048, 'x');
    const client = await Client.to(server);
    await client.send(request(`GET ${target} HTTP/1.1`));
    assert.equal((await client.answer()).status, 200);
    await client.send(request(`GET ${target}x HTTP/1.1`));
    const answer = await client.answer();
    assert.equal(answer.status, 414);
    assertOneLine(answer);
    await client.closes();
});

test('A target longer than a whole head gets 414', async () => {
    for (const size of [4080, 4097, 20000]) {
        const client = await Client.to(server);
        await client.send(`GET /${'x'.repeat(size)} HTTP/1.1\r\n\r\n`);
        assert.equal((await client.answer()).status, 414, `${size}`);
        await client.closes();
    }
});

test('A head of 4096 bytes is served, one of 4097 gets 431', async () => {
    const fill = 4096 - request('GET /healthz HTTP/1.1', 'X-Fill: ').length;
    const head = (more) => request('GET /healthz HTTP/1.1',
        `X-Fill: ${'x'.repeat(fill + more)}`);
    const client = await Client.to(server);
    for (let i = 0; i < 2; i++) {
        await client.send(head(0));
        assert.equal((await client.answer()).status, 200);
    }
    await client.send(head(1));
    const answer = await client.answer();
    assert.equal(answer.status, 431);
    assertOneLine(answer);
    await client.closes();
});

test('A head without an end gets 431', async () => {
    const client = await Client.to(server);
    await client.send(`GET /healthz HTTP/1.1\r\nX: ${'x'.repeat(10000)}`);
    assert.equal((await client.answer()).status, 431);
    await client.closes();
});

test('A method without an end is refused', async () => {
    const client = await Client.to(server);
    await client.send('G'.repeat(10000));
    const { status } = await client.answer();
    assert.ok([400, 414, 431, 501].includes(status), `got ${status}`);
    await client.closes();
});

test('A head of 200 short lines is served or refused, but answered', async () => {
    const client = await Client.to(server);
    await client.send(request('GET /healthz HTTP/1.1',
        ...Array.from({ length: 200 }, (_, i) => `X${i}: y`)));
    assert.ok([200, 431].includes((await client.answer()).status));
    client.socket.destroy();
});

// ----- every refusal says why ----------------------------------------------

const upgrade = (headers, opt) => upgradeRequest('/ws/x', { headers, ...opt });
const from = (address) => ({ 'X-Forwarded-For': address });

// status, request, the setting its body names (if one can help).
const REFUSALS = [
    [400, 'GET /healthz HTTP/1.1\r\n\r\n'],
    [401, request('GET /metrics HTTP/1.1', 'X-Forwarded-For: 198.51.100.7'),
        /--tokens/],
    [403, upgrade({ Origin: 'http://evil.example' }),
        /--origin http:\/\/evil\.example(?![\w:/.])/],
    [404, request('GET /nothing HTTP/1.1'), /--www/],
    [405, request('DELETE /healthz HTTP/1.1')],
    [413, request('GET /healthz HTTP/1.1', 'Content-Length: 1000000')],
    [414, request(`GET /${'x'.repeat(2100)} HTTP/1.1`)],
    [416, request('GET /index.html HTTP/1.1', 'Range: bytes=1000-')],
    [421, 'GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n',
        /--host evil\.example\b/],
    [426, request('GET /ws/x HTTP/1.1')],
    [431, request('GET / HTTP/1.1', `X: ${'x'.repeat(5000)}`)],
    [501, request('BREW /healthz HTTP/1.1')],
    [505, request('GET / HTTP/2.0')],
];

test('Every refusal is one line that says what was wrong and what changes it', async (t) => {
    const tokens = path.join(temporaryFolder(t), 'tokens');
    writeFileSync(tokens, `${'a'.repeat(64)} admin *\n`, { mode: 0o600 });
    const strict = await startServer(t, { args: ['--www', www, '--tokens', tokens,
        '--trust-proxy', '127.0.0.1'] });
    for (const [status, head, setting] of REFUSALS)
        await t.test(`${status}`, async () => {
            const client = await Client.to(strict);
            await client.send(head);
            const answer = await client.answer();
            assert.equal(answer.status, status);
            assertOneLine(answer);
            if (setting)
                assert.match(answer.body, setting);
            client.socket.destroy();
        });
});

test('One connection too many from an address gets 429, which names --max-per-ip', async (t) => {
    const few = await startServer(t, { args: ['--max-per-ip', '1',
        '--trust-proxy', '127.0.0.1'] });
    const first = await few.connect('/ws/x', { headers: from('198.51.100.7') });
    const client = await Client.to(few);
    await client.send(upgrade(from('198.51.100.7')));
    const answer = await client.answer();
    assert.equal(answer.status, 429);
    assertOneLine(answer);
    assert.match(answer.body, /--max-per-ip/);
    await first.silent();
    client.socket.destroy();
});

test('One client too many gets 503, which names --max-clients', async (t) => {
    const few = await startServer(t, { args: ['--max-clients', '1'] });
    const first = await few.connect('/ws/x');
    const client = await Client.to(few);
    await client.send(upgrade({}));
    const answer = await client.answer();
    assert.equal(answer.status, 503);
    assertOneLine(answer);
    assert.match(answer.body, /--max-clients/);
    await client.closes();
    await first.silent();
});

test('One room too many gets 503, which names --max-rooms', async (t) => {
    const few = await startServer(t, { args: ['--max-rooms', '1'] });
    const first = await few.connect('/ws/one');
    const client = await Client.to(few);
    await client.send(upgradeRequest('/ws/two'));
    const answer = await client.answer();
    assert.equal(answer.status, 503);
    assertOneLine(answer);
    assert.match(answer.body, /--max-rooms/);
    await first.silent();
    client.socket.destroy();
});

// ----- slow clients --------------------------------------------------------

const SECOND = 1000;
const descriptors = ({ pid }) => readdirSync(`/proc/${pid}/fd`).length;

// Waits until the server has as few descriptors as before.
async function settles(at, before, ms = 8000 * SLOW) {
    for (const until = Date.now() + ms; descriptors(at) > before;) {
        assert.ok(Date.now() < until, `${descriptors(at) - before} connections stay`);
        await setTimeout(50);
    }
}

test('Whoever is slow is gone by the deadline', async (t) => {
    const args = ['--request-timeout', '1', '--ping-interval', '1',
        '--dead-after', '3', '--www', www];
    const impatient = await startServer(t, { args });
    const before = descriptors(impatient);
    const started = Date.now();
    const well = await impatient.connect('/ws/well?echo=1');

    const stages = [
        ['A client that sends nothing', async () => {
            const client = await Client.to(impatient);
            await client.answer({ ms: 4 * SECOND * SLOW }).then(
                ({ status }) => assert.equal(status, 408),
                (e) => assert.match(e.message, /ended before an answer, got ""/));
            assert.ok(Date.now() - started > 0.7 * SECOND);
            await client.closes();
        }],
        ...[1, 10, GET.length - 20, GET.length - 1].map((at) =>
            [`A client that stops ${at} bytes into a head gets 408, which`, async () => {
                const client = await Client.to(impatient);
                await client.send(GET.slice(0, at));
                const answer = await client.answer({ ms: 4 * SECOND * SLOW });
                assert.ok(Date.now() - started > 0.7 * SECOND);
                assert.equal(answer.status, 408);
                assert.ok(says(answer.headers, 'close'));
                assertOneLine(answer);
                assert.match(answer.body, /--request-timeout/);
                await client.closes();
            }]),
        ['A client that sends a byte of its head now and then', async () => {
            const client = await Client.to(impatient);
            const drip = (async () => {
                for (let i = 0; i < 20 && !client.ended; i++) {
                    client.send(GET[i]);
                    await setTimeout(250);
                }
            })();
            assert.equal((await client.answer({ ms: 4 * SECOND * SLOW })).status, 408);
            await client.closes();
            await drip;
        }],
        ['A connection that is kept alive for nothing', async () => {
            const client = await Client.to(impatient);
            await client.send(GET);
            assert.equal((await client.answer()).status, 200);
            await client.closes({ ms: 4 * SECOND * SLOW });
        }],
        ['A second request that stops half-way', async () => {
            const client = await Client.to(impatient);
            await client.send(GET + GET.slice(0, 30));
            assert.equal((await client.answer()).status, 200);
            assert.equal((await client.answer({ ms: 4 * SECOND * SLOW })).status, 408);
            await client.closes();
        }],
        ['A client that does not read its answer', async () => {
            const socket = await open(impatient);
            socket.pause();
            socket.write(request('GET /big.bin HTTP/1.1'));
        }],
        ...[1, 3, 5, 100].map((at) =>
            [`A client that stops ${at} bytes into a frame`, async () => {
                const peer = await impatient.connect('/ws/half', { autoPong: false });
                await peer.send(frame(OP.BINARY, Buffer.alloc(200)).subarray(0, at));
                const { frames } = await peer.closed(7 * SECOND * SLOW);
                assert.ok(frames.every((f) => f.opcode === OP.PING));
            }]),
        ['A client that answers neither pings nor Close', async () => {
            const peer = await impatient.connect('/ws/dead',
                { autoPong: false, autoClose: false });
            await peer.closed(7 * SECOND * SLOW);
        }],
        ['A client that does not end its Close handshake', async () => {
            const peer = await impatient.connect('/ws/close', { autoClose: false });
            await peer.send(frame(OP.TEXT, 'unmasked', { mask: false }));
            assert.equal((await peer.closed(7 * SECOND * SLOW)).code, 1002);
        }],
    ];
    await Promise.all(stages.map(([who, run]) =>
        run().catch((e) => {
            throw new Error(`${who}: ${e.message}`, { cause: e });
        })));
    await settles(impatient, before + 1);
    await well.text('still here');
    assert.equal((await well.message()).text, 'still here');
});

test('Who answers pings stays, even if the second ping would come too late', async (t) => {
    const hasty = await startServer(t,
        { args: ['--ping-interval', '1', '--dead-after', '2'] });
    const peers = await Promise.all(Array.from({ length: 20 }, () =>
        hasty.connect('/ws/x')));
    await setTimeout(4 * SECOND);
    assert.deepEqual(peers.map((peer) => peer.how), peers.map(() => null));
});

test('A stalled head holds up others no longer than its deadline', async (t) => {
    const narrow = await startServer(t,
        { args: ['--request-timeout', '1', '--max-requests', '1'] });
    const stalled = await Client.to(narrow);
    await stalled.send(GET.slice(0, 20));
    await setTimeout(100);
    const client = await Client.to(narrow);
    await client.send(GET);
    const { status } = await client.answer({ ms: 4 * SECOND * SLOW });
    assert.ok([200, 503].includes(status), `got ${status}`);
    assert.equal((await stalled.answer({ ms: 4 * SECOND * SLOW })).status, 408);
    const { status: then } = await narrow.get('/healthz');
    assert.equal(then, 200);
    client.socket.destroy();
});

test('A stalled frame holds up others no longer than two seconds', async (t) => {
    const narrow = await startServer(t, { args: ['--receive-buffers', '1'] });
    const stalled = await narrow.connect('/ws/a');
    await stalled.send(frame(OP.TEXT, 'never whole').subarray(0, 8));
    await setTimeout(100);
    const well = await narrow.connect('/ws/b?echo=1');
    await well.text('patience');
    assert.equal((await well.message(6 * SECOND * SLOW)).text, 'patience');
    await stalled.closed();
});

test('Two hundred slow clients hold up a fast one no longer than their deadline', { timeout: 30 * SECOND * SLOW }, async (t) => {
    const busy = await startServer(t, { args: ['--request-timeout', '2'] });
    const slow = await Promise.all(Array.from({ length: 200 }, () => Client.to(busy)));
    slow.forEach((client) => client.send(GET.slice(0, 25)));
    const started = Date.now();
    const { status } = await busy.get('/healthz');
    assert.ok([200, 503].includes(status), `got ${status}`);
    assert.ok(Date.now() - started < 4 * SECOND * SLOW);
    while (slow.some((client) => !client.ended)) {
        assert.ok(Date.now() - started < 10 * SECOND * SLOW, 'some stay');
        await setTimeout(20);
    }
    assert.equal((await busy.get('/healthz')).status, 200);
});
