// SPDX-License-Identifier: MIT
// Goal: the opening handshake is RFC 6455 4.2 on top of RFC 9110 and 9112, to
// the letter. What is right is accepted in every spelling the grammar allows,
// in packets of any size; what is wrong is refused with the right status and
// does no harm.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import {
    OP, SLOW, acceptKey, connect, frame, handshake, open, upgradeRequest,
} from './lib/raw.js';
import { startServer } from './lib/server.js';

const KEY = 'dGhlIHNhbXBsZSBub25jZQ==';     // the RFC's own example
const PATH = '/ws/upgrade?echo=1';
const PLAIN = upgradeRequest(PATH);

const server = await startServer({ after });

// A right head with one piece of text replaced; fails if it was not there.
function changed(from, to, head = PLAIN) {
    assert.ok(head.includes(from), `"${from}" is not in the head`);
    return head.replace(from, () => to);
}

// One more line after the request line.
const withLine = (line) => changed('\r\nHost:', `\r\n${line}\r\nHost:`);

const withTarget = (target) => changed(PATH, target);

// Bytes 0x80 to 0xff stand for themselves in these tests' heads.
const raw = (text) => Buffer.from(text, 'latin1');

async function echoes(peer) {
    await peer.text('are you there?');
    assert.equal((await peer.message()).text, 'are you there?');
    await peer.close(1000);
    assert.equal((await peer.closed()).code, 1000);
}

async function serverIsWell() {
    await echoes(await server.connect(PATH));
}

test('The answer is the one of RFC 6455 1.3, and nothing is negotiated', async () => {
    const { status, headers, rest, socket } = await server.handshake(PATH, {
        key: KEY,
        headers: {
            'Sec-WebSocket-Protocol': 'chat, superchat',
            'Sec-WebSocket-Extensions':
                'permessage-deflate; client_max_window_bits, x-other',
        },
    });
    socket.destroy();
    assert.equal(status, 101);
    assert.equal(headers['sec-websocket-accept'], 's3pPLMBiTxaQ9kYGzzhZRbK+xOo=');
    assert.equal(headers.upgrade.toLowerCase(), 'websocket');
    assert.equal(headers.connection.toLowerCase(), 'upgrade');
    assert.equal(headers['sec-websocket-protocol'], undefined);
    assert.equal(headers['sec-websocket-extensions'], undefined);
    assert.equal(headers['content-length'], undefined);
    assert.equal(headers['transfer-encoding'], undefined);
    assert.equal(rest.length, 0);
});

const ACCEPTED = [
    ['with "Connection: keep-alive, Upgrade"',
        upgradeRequest(PATH, { headers: { Connection: 'keep-alive, Upgrade' } })],
    ['with "Connection: UPGRADE,keep-alive"',
        upgradeRequest(PATH, { headers: { Connection: 'UPGRADE,keep-alive' } })],
    ['with empty members in the list of Connection',
        upgradeRequest(PATH, { headers: { Connection: ' ,, \t upgrade ,' } })],
    ['with Connection on two lines',
        upgradeRequest(PATH, { headers: { Connection: ['keep-alive', 'upgrade'] } })],
    ['with "Upgrade: foo, WebSocket"',
        upgradeRequest(PATH, { headers: { Upgrade: 'foo, WebSocket' } })],
    ['with "Upgrade: WEBSOCKET" as the second of two lines',
        upgradeRequest(PATH, { headers: { Upgrade: ['h2c', 'WEBSOCKET'] } })],
    ['with a protocol with a version beside websocket',
        upgradeRequest(PATH, { headers: { Upgrade: 'IRC/6.9,websocket' } })],
    ['with field names in capitals', PLAIN.replace(
        /^[\w-]+(?=: )/gm, (name) => name.toUpperCase())],
    ['with field names in small letters', PLAIN.replace(
        /^[\w-]+(?=: )/gm, (name) => name.toLowerCase())],
    ['without a space after the colons', PLAIN.replaceAll(': ', ':')],
    ['with tabs and spaces around the values',
        PLAIN.replaceAll(': ', ': \t  ').replaceAll('\r\n', ' \t\r\n')
            .replace(' \t\r\n', '\r\n').replace(/ \t\r\n$/, '\r\n')],
    ['with an empty value in a foreign field', withLine('X-Empty:')],
    ['with bytes above 127 in a value', withLine('X-Name: M\xfcller')],
    ['with a quotation mark, a comma and a tab in a value',
        withLine('X-Odd: "a,\tb"')],
    ['with every sign of a token in a name',
        withLine("!#$%&'*+-.^_`|~09azAZ: x")],
    ['with thirty foreign fields', withLine(
        Array.from({ length: 30 }, (_, i) => `X-${i}: ${i}`).join('\r\n'))],
    ['with an empty line before the request line', `\r\n${PLAIN}`],
    ['with the absolute form of the target',
        withTarget(`http://localhost${PATH}`)],
    ['with the absolute form, scheme and host in capitals, and a port',
        withTarget(`HTTP://LOCALHOST:80${PATH}`)],
    ['with the absolute form, whose host is the one that counts',
        changed('Host: localhost', 'Host: elsewhere.example',
            withTarget(`http://localhost${PATH}`))],
    ['as HTTP/1.2, which is to be read as 1.1', changed('HTTP/1.1', 'HTTP/1.2')],
    ['with "Content-Length: 0"', withLine('Content-Length: 0')],
    ['with an unknown query parameter', withTarget(`${PATH}&x=%20&y`)],
    ['with a name of 128 bytes', withTarget(`/ws/${'n'.repeat(128)}?echo=1`)],
    ['with a name of 128 bytes, each encoded',
        withTarget(`/ws/${'%c3%A9'.repeat(64)}?echo=1`)],
    ['with slashes in the name', withTarget('/ws/a/b/c?echo=1')],
    ['with dots that are no dot segments', withTarget('/ws/.a/b../...?echo=1')],
    ['with every sign a path may have as it is',
        withTarget("/ws/-._~!$&'()*+,;=:@?echo=1")],
];

for (const [how, head] of ACCEPTED)
    test(`An upgrade is accepted ${how}`, async () => {
        await echoes(await connect(server, '', { head: raw(head), key: KEY }));
    });

// Assumptions where the RFCs leave a choice: a lone LF as the end of a line is
// refused, and so are raw bytes above 127 in a target.
const BAD_HEADS = [
    ['has no Host', upgradeRequest(PATH, { headers: { Host: null } })],
    ['has two Hosts',
        upgradeRequest(PATH, { headers: { Host: ['localhost', 'other'] } })],
    ['has the same Host twice',
        upgradeRequest(PATH, { headers: { Host: ['localhost', 'localhost'] } })],
    ...['a b', 'user@localhost', 'localhost:80:80', 'localhost:x',
        '[::1', '[::1]x', 'local/host', 'local%host',
        'localhost?x'].map((host) => [`has the Host "${host}"`,
        upgradeRequest(PATH, { headers: { Host: host } })]),
    ['has no key',
        upgradeRequest(PATH, { headers: { 'Sec-WebSocket-Key': null } })],
    ['has two keys', upgradeRequest(PATH,
        { headers: { 'Sec-WebSocket-Key': [KEY, 'AAAAAAAAAAAAAAAAAAAAAA=='] } })],
    ...[
        ['empty', ''], ['of 15 bytes', 'AAAAAAAAAAAAAAAAAAAA'],
        ['of 17 bytes', 'AAAAAAAAAAAAAAAAAAAAAAA='],
        ['of 18 bytes', 'AAAAAAAAAAAAAAAAAAAAAAAA'],
        ['without its padding', 'dGhlIHNhbXBsZSBub25jZQ'],
        ['with half its padding', 'dGhlIHNhbXBsZSBub25jZQ='],
        ['with a sign that is not base64', 'dGhlIHNhbXBs!SBub25jZQ=='],
        ['with the signs of base64url', 'dGhlIHNhbXB_-SBub25jZQ=='],
        ['with a space inside', 'dGhlIHNhbXBs SBub25jZQ=='],
        ['with padding inside', 'dGhlIHNhbX=sZSBub25jZQ=='],
        ['and more behind it', 'dGhlIHNhbXBsZSBub25jZQ==, x'],
    ].map(([how, key]) => [`has a key ${how}`, upgradeRequest(PATH, { key })]),

    ['folds a line', withLine('X-Folded: one\r\n two')],
    ['folds a line with a tab', withLine('X-Folded: one\r\n\ttwo')],
    ['begins its fields with a folded line',
        changed('\r\nHost:', '\r\n Host:')],
    ['has a space before a colon', changed('Host:', 'Host :')],
    ['has a tab before a colon', changed('Host:', 'Host\t:')],
    ['has a line without a colon', withLine('X-Nothing')],
    ['has a field without a name', withLine(': value')],
    ['has a space inside a name', withLine('X Name: value')],
    ['has a bracket inside a name', withLine('X(Name): value')],
    ['has a byte above 127 inside a name', withLine('X-N\xe4me: value')],
    ['has a NUL inside a name', withLine('X-N\0me: value')],
    ['has a NUL in a value', withLine('X-Value: a\0b')],
    ['has a control character in a value', withLine('X-Value: a\x01b')],
    ['has an escape in a value', withLine('X-Value: a\x1bb')],
    ['has a DEL in a value', withLine('X-Value: a\x7fb')],
    ['has a bare CR in a value', withLine('X-Value: a\rb')],
    ['ends a line with CR CR LF', withLine('X-Value: a\r')],
    ['ends its lines with a lone LF', PLAIN.replaceAll('\r\n', '\n')],
    ['ends one line with a lone LF', withLine('X-Value: a\nX-Other: b')],
    ['ends the request line with a lone LF',
        changed('HTTP/1.1\r\n', 'HTTP/1.1\n')],

    ['begins with a space', ` ${PLAIN}`],
    ['has two spaces before the target', changed('GET ', 'GET  ')],
    ['has a tab before the target', changed('GET ', 'GET\t')],
    ['has two spaces before the version', changed(' HTTP', '  HTTP')],
    ['has a space behind the version', changed('HTTP/1.1', 'HTTP/1.1 ')],
    ['has no version', changed(' HTTP/1.1', '')],
    ['has no target', changed(`${PATH} `, '')],
    ['has a fourth word in the request line', changed(' HTTP', ' x HTTP')],
    ...['http/1.1', 'HTTP/1', 'HTTP/1.', 'HTTP/11', 'HTTP/1.1x', 'HTTP/01.1',
        'HTTP/1.10', 'HTTP/a.b', 'HTTP 1.1', 'XTTP/1.1', 'HTTPS/1.1'].map((version) =>
        [`has the version "${version}"`, changed('HTTP/1.1', version)]),
    ['has a method that is no token', changed('GET', 'G(T')],
    ['has a NUL in its method', changed('GET', 'G\0T')],

    ...[
        ['without a leading slash', 'ws/x'], ['with a fragment', '/ws/x#part'],
        ['of another scheme', 'ftp://localhost/ws/x'],
        ['with a user in its authority', 'http://me@localhost/ws/x'],
        ['with an authority that is empty', 'http:///ws/x'],
        ['that is a lone asterisk', '*'],
        ['that ends in a lone percent sign', '/ws/x%'],
        ['that ends in half an encoding', '/ws/x%4'],
        ['with an encoding that is not hexadecimal', '/ws/x%4g'],
        ['with a sign before the digits of an encoding', '/ws/x%+1'],
        ['with a broken encoding in its query', '/ws/x?echo=%zz'],
        ['with an encoded NUL', '/ws/x%00'],
        ['with an encoded NUL in its query', '/ws/x?token=a%00b'],
        ['with an encoded control character', '/ws/a%0ab'],
        ['with an encoded DEL', '/ws/a%7Fb'],
        ['with an encoded C1 control character', '/ws/a%C2%85b'],
        ['with a stray continuation byte', '/ws/%80'],
        ['with a byte that UTF-8 never has', '/ws/%ff'],
        ['with UTF-8 cut short', '/ws/%e2%82'],
        ['with an overlong slash', '/ws/%c0%af'],
        ['with an encoded surrogate', '/ws/%ed%a0%80'],
        ['beyond the end of Unicode', '/ws/%f4%90%80%80'],
        ['with a raw byte above 127', '/ws/\xfc'],
        ['with a raw control character', '/ws/a\x01b'],
        ['with a raw NUL', '/ws/a\0b'],
    ].map(([how, target]) => [`has a target ${how}`, withTarget(target)]),
];

for (const [how, head] of BAD_HEADS)
    test(`An upgrade whose head ${how} gets 400`, async () => {
        const { status, headers, socket } =
            await handshake(server, '', { head: raw(head) });
        socket.destroy();
        assert.equal(status, 400);
        assert.equal(headers.connection?.toLowerCase(), 'close');
    });

// Expected status, and headers that must match.
const WEBSOCKET = { upgrade: /^websocket$/i, connection: /\bupgrade\b/i };
const OTHER = [
    ['to a path that is nothing', withTarget('/nothing/here'), [404]],
    ['to /ws', withTarget('/ws'), [400, 404]],
    ['to a channel without a name', withTarget('/ws/'), [400, 404]],
    ['to a name of 129 bytes', withTarget(`/ws/${'n'.repeat(129)}`), [400, 404]],
    ['to a name of 129 encoded bytes',
        withTarget(`/ws/n${'%c3%a9'.repeat(64)}`), [400, 404]],
    ...['//x', '/a//b', '/a/', '/.', '/..', '/a/./b', '/a/../b', '/a/..',
        '/%2e', '/%2E%2e', '/a/%2e%2e/b', '/a%2f%2fb', '/a%2F..%2Fb'].map((name) =>
        [`to the name ${name}`, withTarget(`/ws${name}`), [400, 404]]),

    ['without an Upgrade field', upgradeRequest(PATH,
        { headers: { Upgrade: null, Connection: null } }), [426], WEBSOCKET],
    ['to another protocol',
        upgradeRequest(PATH, { headers: { Upgrade: 'h2c' } }), [426], WEBSOCKET],
    ['to "websockets"', upgradeRequest(PATH,
        { headers: { Upgrade: 'websockets' } }), [426], WEBSOCKET],
    ['to "web socket"', upgradeRequest(PATH,
        { headers: { Upgrade: 'web socket' } }), [400, 426]],
    ['without a Connection field',
        upgradeRequest(PATH, { headers: { Connection: null } }), [400, 426]],
    ['with "Connection: keep-alive" only', upgradeRequest(PATH,
        { headers: { Connection: 'keep-alive' } }), [400, 426]],
    ['with "Connection: upgraded"', upgradeRequest(PATH,
        { headers: { Connection: 'upgraded, xupgrade' } }), [400, 426]],
    ['with HTTP/1.0', upgradeRequest(PATH, { version: 'HTTP/1.0' }), [400, 426]],
    ['with HTTP/2.0', upgradeRequest(PATH, { version: 'HTTP/2.0' }), [505]],
    ['with HTTP/3.0', upgradeRequest(PATH, { version: 'HTTP/3.0' }), [505]],
    ['with HTTP/0.9', upgradeRequest(PATH, { version: 'HTTP/0.9' }), [400, 505]],
    ['with the preface of HTTP/2',
        'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', [400, 505]],

    ...['12', '14', '8', '0', '130', '1'].map((version) =>
        [`with version ${version}`, upgradeRequest(PATH,
            { headers: { 'Sec-WebSocket-Version': version } }),
        [426], { 'sec-websocket-version': /^13$/ }]),
    ...['013', '+13', 'x', '-1', '256', '13.0', '13, 8', ''].map((version) =>
        [`with the version "${version}"`, upgradeRequest(PATH,
            { headers: { 'Sec-WebSocket-Version': version } }), [400, 426]]),
    ['with two versions', upgradeRequest(PATH,
        { headers: { 'Sec-WebSocket-Version': ['13', '8'] } }), [400, 426]],
    ['without a version', upgradeRequest(PATH,
        { headers: { 'Sec-WebSocket-Version': null } }), [400, 426]],

    ...['POST', 'PUT', 'DELETE', 'PATCH'].map((method) =>
        [`with ${method}`, upgradeRequest(PATH, { method }), [405],
            { allow: /\bGET\b/ }]),
    ['with HEAD', upgradeRequest(PATH, { method: 'HEAD' }), [405, 426]],
    ['with CONNECT', upgradeRequest(PATH, { method: 'CONNECT' }), [400, 405, 501]],
    ['with an unknown method', upgradeRequest(PATH, { method: 'BREW' }), [501]],
    ['with "get", for methods know their case',
        upgradeRequest(PATH, { method: 'get' }), [405, 501]],

    ['with a body', withLine('Content-Length: 6'), [400, 413]],
    ['with a chunked body',
        withLine('Transfer-Encoding: chunked'), [400, 413, 501]],
];

for (const [how, head, statuses, wanted = {}] of OTHER)
    test(`An upgrade ${how} gets ${statuses.join(' or ')}`, async () => {
        const { status, headers, socket } =
            await handshake(server, '', { head: raw(head) });
        socket.destroy();
        assert.ok(statuses.includes(status), `got ${status}`);
        for (const [name, pattern] of Object.entries(wanted))
            assert.match(headers[name] ?? '(none)', pattern, name);
    });

test('A name is percent-decoded before rooms are compared', async () => {
    const plain = await server.connect('/ws/caf%C3%A9/a-b');
    const encoded = await server.connect('/ws/%63af%c3%a9%2Fa%2Db');
    const other = await server.connect('/ws/Caf%C3%A9/a-b');
    await encoded.text('same room');
    assert.equal((await plain.message()).text, 'same room');
    await other.silent();
});

// ----- packets -------------------------------------------------------------

// The answer's head, and how the stream ended if it did, on a bare socket.
async function readHead(socket) {
    let got = '';
    for await (const chunk of socket.setEncoding('latin1').iterator(
        { destroyOnReturn: false }))
        if ((got += chunk).includes('\r\n\r\n'))
            break;
    return got;
}

test('A head that comes byte by byte is a head', async () => {
    const socket = await open(server);
    const answer = readHead(socket);
    for (const byte of Buffer.from(PLAIN)) {
        socket.write(Buffer.of(byte));
        await setImmediate();
    }
    assert.match(await answer, /^HTTP\/1\.1 101 /);
    assert.ok((await answer).includes(acceptKey(KEY)));
    socket.destroy();
});

test('A head may be cut in two anywhere', async () => {
    for (let at = 1; at < PLAIN.length; at++) {
        const socket = await open(server);
        const answer = readHead(socket);
        socket.write(PLAIN.slice(0, at));
        await setImmediate();
        socket.write(PLAIN.slice(at));
        assert.match(await answer, /^HTTP\/1\.1 101 /, `cut at ${at}`);
        socket.destroy();
    }
});

test('Every prefix of a head, then the end, gets no upgrade and does no harm', async () => {
    const half = async (at) => {
        const socket = await open(server);
        let got = '';
        socket.setEncoding('latin1').on('data', (chunk) => (got += chunk));
        const closed = once(socket, 'close');
        socket.end(PLAIN.slice(0, at));
        socket.on('end', () => socket.destroy());
        await closed;
        assert.doesNotMatch(got, /^HTTP\/1\.1 [123]/, `cut at ${at}`);
    };
    for (let at = 0; at < PLAIN.length; at += 20)
        await Promise.all(Array.from({ length: Math.min(20, PLAIN.length - at) },
            (_, i) => half(at + i)));
    await serverIsWell();
});

test('Every prefix of a head, then a reset, does no harm', async () => {
    for (let at = 0; at <= PLAIN.length; at++) {
        const socket = await open(server);
        await new Promise((done) => socket.write(PLAIN.slice(0, at), done));
        socket.resetAndDestroy();
    }
    await serverIsWell();
});

test('Frames in the same packet as the head belong to the stream', async () => {
    const three = ['one', 'two', 'three'];
    const peer = await server.connect(PATH, {
        with: Buffer.concat(three.map((text) => frame(OP.TEXT, text))),
    });
    assert.deepEqual((await peer.messages(3)).map((m) => m.text), three);
    await echoes(peer);
});

test('Half a frame in the same packet as the head is completed later', async () => {
    const whole = frame(OP.TEXT, 'begun early');
    for (let at = 1; at < whole.length; at++) {
        const peer = await server.connect(PATH, { with: whole.subarray(0, at) });
        await peer.send(whole.subarray(at));
        assert.equal((await peer.message()).text, 'begun early', `cut at ${at}`);
        await peer.close(1000);
        await peer.closed();
    }
});

test('More bytes behind the head than a head may have are kept whole', async () => {
    const many = Array.from({ length: 20 }, (_, i) =>
        Buffer.alloc(1500, 65 + i));
    const peer = await server.connect('/ws/behind?echo=1', {
        with: Buffer.concat(many.map((data) => frame(OP.BINARY, data))),
    });
    for (const data of many)
        assert.deepEqual((await peer.message()).data, data);
});

test('A Close in the same packet as the head is answered', async () => {
    const peer = await server.connect(PATH,
        { with: frame(OP.CLOSE, Buffer.from([3, 232])) });
    assert.equal((await peer.closed()).code, 1000);
});

test('An upgrade is the second of two requests in one packet', async () => {
    const head = 'HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n';
    const first = await handshake(server, '', { head, with: PLAIN });
    assert.equal(first.status, 200);
    let got = first.rest.toString('latin1');
    if (!got.includes('HTTP/1.1 101'))
        got += await readHead(first.socket);
    assert.match(got, /HTTP\/1\.1 101 /);
    first.socket.destroy();
});

test('A hundred upgrades at once all succeed', { timeout: 20000 * SLOW }, async () => {
    const peers = await Promise.all(Array.from({ length: 100 }, (_, i) =>
        server.connect(`/ws/rush-${i % 10}?echo=1`)));
    await Promise.all(peers.map(async (peer, i) => {
        await peer.text(`from ${i}`);
        const texts = (await peer.messages(10)).map((m) => m.text).sort();
        assert.deepEqual(texts, Array.from({ length: 10 },
            (_, k) => `from ${k * 10 + (i % 10)}`).sort());
    }));
});
