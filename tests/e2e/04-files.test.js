// SPDX-License-Identifier: MIT
// Goal: `--www DIR` serves what is in DIR as a browser, a cache and a download
// manager expect it, and nothing that is not in DIR, whatever the path says;
// and a download harms nobody else, even when its file changes under way.

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import crypto from 'node:crypto';
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { gzipSync } from 'node:zlib';
import { SLOW, handshake, open } from './lib/raw.js';
import { startServer, temporaryFolder } from './lib/server.js';

// ----- the folder ----------------------------------------------------------

const outside = temporaryFolder({ after });
const www = path.join(outside, 'www');
const SECRET = 'not for you\n';
const ALPHABET = 'abcdefghijklmnopqrstuvwxyz';
const SCRIPT = 'export const x = 1;\n'.repeat(100);
const TYPES = {
    html: 'text/html', js: 'text/javascript', mjs: 'text/javascript',
    css: 'text/css', json: 'application/json', wasm: 'application/wasm',
    svg: 'image/svg+xml', png: 'image/png', ico: /^image\/(x-icon|vnd\.microsoft\.icon)$/,
    txt: 'text/plain', woff2: 'font/woff2', unheardof: 'application/octet-stream',
};

function put(name, data) {
    const file = path.join(www, name);
    fs.mkdirSync(path.dirname(file), { recursive: true });
    fs.writeFileSync(file, data);
    return file;
}

put('index.html', '<title>front</title>\n');
put('sub/index.html', '<title>sub</title>\n');
put('empty-folder/deep/file.txt', 'deep\n');
put('alphabet.txt', ALPHABET);
put('empty.txt', '');
put('no-extension', 'x');
put('UPPER.HTML', '<p>upper</p>');
put('with space.txt', 'space\n');
put('ünï.txt', 'umlaut\n');
put('..hidden.txt', 'two dots\n');
put('app.js', SCRIPT);
put('app.js.gz', gzipSync(SCRIPT));
put('only.css.gz', gzipSync('p {}'));
for (const type of Object.keys(TYPES))
    put(`types/file.${type}`, `a ${type}\n`);
fs.writeFileSync(path.join(outside, 'secret.txt'), SECRET);
fs.mkdirSync(path.join(outside, 'www-secret'));
fs.writeFileSync(path.join(outside, 'www-secret', 'secret.txt'), SECRET);
fs.symlinkSync('../secret.txt', path.join(www, 'link.txt'));
fs.symlinkSync(path.join(outside, 'secret.txt'), path.join(www, 'absolute.txt'));
fs.symlinkSync('..', path.join(www, 'up'));
fs.symlinkSync('/', path.join(www, 'root'));
fs.symlinkSync('../../secret.txt', path.join(www, 'sub', 'link.txt'));
fs.symlinkSync('loop', path.join(www, 'loop'));
execFileSync('mkfifo', [path.join(www, 'fifo')]);

const server = await startServer({ after }, { args: ['--www', www] });

// { status, headers, body (Buffer) }; the path goes out as it is.
function get(where, headers = {}, method = 'GET', from = server) {
    return new Promise((resolve, reject) => {
        const request = http.request({
            host: '127.0.0.1', port: from.port, path: where, method, headers,
            agent: false, timeout: 10000 * SLOW,
        }, async (response) => {
            const chunks = [];
            try {
                for await (const chunk of response)
                    chunks.push(chunk);
            } catch (e) {
                reject(e);
            }
            resolve({ status: response.statusCode, headers: response.headers,
                body: Buffer.concat(chunks) });
        });
        request.on('timeout', () => request.destroy(new Error(`${where}: no answer`)));
        request.on('error', reject).end();
    });
}

// ----- what is served ------------------------------------------------------

test('A file is served whole, with its type, and no guessing', async () => {
    for (const [extension, type] of Object.entries(TYPES)) {
        const { status, headers, body } = await get(`/types/file.${extension}`);
        assert.equal(status, 200, extension);
        assert.equal(body.toString(), `a ${extension}\n`);
        assert.equal(headers['content-length'], String(body.length));
        assert.equal(headers['x-content-type-options'], 'nosniff');
        const [plain, parameter] = headers['content-type'].split(/; */);
        if (type instanceof RegExp)
            assert.match(plain, type);
        else
            assert.equal(plain, type);
        if (plain.startsWith('text/'))
            assert.match(parameter, /^charset=utf-8$/i, extension);
    }
    const none = await get('/no-extension');
    assert.equal(none.headers['content-type'], 'application/octet-stream');
    const upper = await get('/UPPER.HTML');
    assert.match(upper.headers['content-type'], /^text\/html/);
});

test('Names are percent-decoded once, and a query does not matter', async () => {
    const cases = {
        '/alphabet.txt': ALPHABET, '/alphabet.txt?v=1': ALPHABET,
        '/alphabet.txt?': ALPHABET, '/%61lphabet%2Etxt': ALPHABET,
        '/with%20space.txt': 'space\n', '/%C3%BCn%c3%af.txt': 'umlaut\n',
        '/empty.txt': '', '/..hidden.txt': 'two dots\n',
        '/empty-folder/deep/file.txt': 'deep\n',
    };
    for (const [where, text] of Object.entries(cases)) {
        const { status, body } = await get(where);
        assert.deepEqual([status, body.toString()], [200, text], where);
    }
    for (const where of ['/%2561lphabet.txt', '/with+space.txt', '/Alphabet.txt',
        '/alphabet.txt/', '/alphabet.txt/x', '/alphabet', '/nothing', '/sub/nothing',
        '/fifo', '/loop', `/${'x'.repeat(300)}`, `/${'x/'.repeat(900)}`])
        assert.equal((await get(where)).status, 404, where);
});

test('A folder is its index.html, and is told its slash', async () => {
    assert.match((await get('/')).body.toString(), /front/);
    const slash = await get('/sub/');
    assert.match(slash.body.toString(), /sub/);
    assert.match(slash.headers['content-type'], /^text\/html/);
    for (const [where, wanted] of [['/sub', '/sub/'], ['/sub?a=1', '/sub/?a=1']]) {
        const { status, headers } = await get(where);
        assert.equal(status, 301);
        assert.equal(headers.location, wanted);
    }
    for (const where of ['/empty-folder/', '/empty-folder/deep/'])
        assert.ok([403, 404].includes((await get(where)).status), where);
});

test('Without an index.html there is no listing of files', async () => {
    const { body } = await get('/empty-folder/');
    assert.doesNotMatch(body.toString(), /deep/);
});

test('Only GET and HEAD are allowed', async () => {
    for (const method of ['POST', 'PUT', 'DELETE', 'PATCH']) {
        const { status, headers } = await get('/alphabet.txt', {}, method);
        assert.equal(status, 405);
        assert.match(headers.allow, /GET.*HEAD|HEAD.*GET/);
    }
    assert.equal(fs.readFileSync(path.join(www, 'alphabet.txt'), 'utf8'), ALPHABET);
});

test('HEAD has the fields of GET and no body', async () => {
    for (const where of ['/alphabet.txt', '/app.js', '/empty.txt', '/', '/sub']) {
        const headers = { 'Accept-Encoding': 'gzip' };
        const want = await get(where, headers);
        const head = await get(where, headers, 'HEAD');
        assert.equal(head.body.length, 0);
        delete want.headers.date;
        delete head.headers.date;
        assert.deepEqual([head.status, head.headers], [want.status, want.headers]);
    }
});

test('The server\'s own paths come before files', async (t) => {
    const dir = temporaryFolder(t);
    fs.writeFileSync(path.join(dir, 'healthz'), 'a file');
    fs.mkdirSync(path.join(dir, 'ws'));
    fs.writeFileSync(path.join(dir, 'ws', 'x'), 'a file');
    const other = await startServer(t, { args: ['--www', dir] });
    assert.match((await other.get('/healthz')).body, /"status"/);
    assert.equal((await other.get('/ws/x')).status, 426);
});

test('A file that is new or changed is served at once', async () => {
    const file = put('fresh.txt', 'one\n');
    const first = await get('/fresh.txt');
    assert.equal(first.body.toString(), 'one\n');
    fs.writeFileSync(file, 'two\n');
    const second = await get('/fresh.txt', { 'If-None-Match': first.headers.etag });
    assert.deepEqual([second.status, second.body.toString()], [200, 'two\n']);
    fs.unlinkSync(file);
    assert.equal((await get('/fresh.txt')).status, 404);
});

// ----- caches --------------------------------------------------------------

test('Who has the file already gets 304', async () => {
    const { headers } = await get('/alphabet.txt');
    const etag = headers.etag;
    assert.match(etag, /^(W\/)?"[\x21\x23-\x7e]*"$/);
    const opaque = etag.replace(/^W\//, '');
    const cases = [
        [etag, 304], [opaque, 304], [`W/${opaque}`, 304], ['*', 304],
        [`"x", ${etag}`, 304], [`${etag}, "x"`, 304], [`"x",,W/"y" ,\t${opaque}`, 304],
        [`"a, ${opaque.slice(1)}`, 200], ['"x"', 200], ['"x", W/"y"', 200],
        [opaque.slice(1, -1), 200], [`${opaque.slice(0, -1)}x"`, 200], ['""', 200],
    ];
    for (const method of ['GET', 'HEAD'])
        for (const [value, wanted] of cases) {
            const got = await get('/alphabet.txt', { 'If-None-Match': value }, method);
            assert.equal(got.status, wanted, `${method} ${value}`);
            if (wanted === 304) {
                assert.equal(got.headers.etag, etag);
                assert.equal(got.body.length, 0);
            }
        }
    const missing = await get('/nothing', { 'If-None-Match': '*' });
    assert.equal(missing.status, 404);
});

test('A 304 comes before a Range', async () => {
    const { headers: { etag } } = await get('/alphabet.txt');
    const got = await get('/alphabet.txt',
        { 'If-None-Match': etag, Range: 'bytes=0-1' });
    assert.equal(got.status, 304);
});

test('An ETag changes with the content, even within a second', async () => {
    const seen = new Set();
    for (const text of ['one', 'two', 'three', 'on', 'owt']) {
        put('tag.txt', text);
        seen.add((await get('/tag.txt')).headers.etag);
        await setTimeout(20);
    }
    assert.equal(seen.size, 5);
});

// ----- ranges --------------------------------------------------------------

const RANGES = [
    ['bytes=0-0', 'a'], ['bytes=0-4', 'abcde'], ['bytes=10-', 'klmnopqrstuvwxyz'],
    ['bytes=-5', 'vwxyz'], ['bytes=-26', ALPHABET], ['bytes=-100', ALPHABET],
    ['bytes=25-25', 'z'], ['bytes=25-100', 'z'], ['bytes=0-', ALPHABET],
    ['bytes=20-99999999999999999999', 'uvwxyz'], ['BYTES=1-2', 'bc'],
    ['bytes= 1-2', 'bc'], ['bytes=1-2 ', 'bc'], ['bytes=01-02', 'bc'],
];

for (const [range, text] of RANGES)
    test(`Range: ${range} gets ${text.length} bytes of 26`, async () => {
        const { status, headers, body } = await get('/alphabet.txt', { Range: range });
        assert.equal(status, 206);
        assert.equal(body.toString(), text);
        const start = ALPHABET.indexOf(text);
        assert.equal(headers['content-range'],
            `bytes ${start}-${start + text.length - 1}/26`);
        assert.ok(headers.etag);
        const head = await get('/alphabet.txt', { Range: range }, 'HEAD');
        assert.ok([200, 206].includes(head.status) && head.body.length === 0);
    });

for (const range of ['bytes=26-', 'bytes=26-30', 'bytes=-0',
    'bytes=99999999999999999999-', 'bytes=1000-2000'])
    test(`Range: ${range} of 26 bytes gets 416`, async () => {
        const { status, headers } = await get('/alphabet.txt', { Range: range });
        assert.equal(status, 416);
        assert.equal(headers['content-range'], 'bytes */26');
    });

// Not understood or not offered: the field does not count.
for (const range of ['bytes=0-1,3-4', 'bytes=0-1, 30-', 'bytes=5-2', 'bytes=',
    'bytes=-', 'bytes=x', 'bytes=1', 'bytes=a-b', 'bytes=1-2x', 'bytes=--1',
    'bytes=+1-2', 'bytes 0-1', 'items=0-1', '0-1', 'bytes=1-2-3'])
    test(`Range: ${range} gets the whole file`, async () => {
        const { status, headers, body } = await get('/alphabet.txt', { Range: range });
        assert.equal(status, 200);
        assert.equal(headers['content-range'], undefined);
        assert.equal(body.toString(), ALPHABET);
    });

test('An empty file has no range', async () => {
    const { status, headers } = await get('/empty.txt', { Range: 'bytes=0-' });
    assert.equal(status, 416);
    assert.equal(headers['content-range'], 'bytes */0');
});

test('If-Range decides whether a Range counts', async () => {
    const { headers: { etag, ...rest } } = await get('/alphabet.txt');
    const modified = rest['last-modified'];
    const cases = [
        [`W/${etag.replace(/^W\//, '')}`, 200], ['"x"', 200], [`${etag}, "x"`, 200],
        ['Thu, 01 Jan 1970 00:00:00 GMT', 200], ['nonsense', 200],
        // A strong tag was promised by not writing W/.
        ...(etag.startsWith('W/') ? [] : [[etag, 206]]),
        ...(modified ? [[modified, 206]] : []),
    ];
    assert.ok(cases.some(([, status]) => status === 206), 'no way to resume');
    for (const [value, wanted] of cases) {
        const { status, body } = await get('/alphabet.txt',
            { Range: 'bytes=1-2', 'If-Range': value });
        assert.equal(status, wanted, value);
        assert.equal(body.toString(), wanted === 206 ? 'bc' : ALPHABET);
    }
    const alone = await get('/alphabet.txt', { 'If-Range': etag });
    assert.equal(alone.status, 200);
});

test('Ranges are offered', async () => {
    assert.equal((await get('/alphabet.txt')).headers['accept-ranges'], 'bytes');
});

// ----- precompressed -------------------------------------------------------

const ENCODINGS = [
    ['gzip', true], ['GZIP', true], ['deflate, gzip', true], ['br;q=1.0, gzip;q=0.5', true],
    ['gzip ; q=0.001', true], ['gzip;q=1.000', true], ['*', true],
    ['identity;q=0.5, gzip;q=1.0', true], [',, gzip ,', true],
    [undefined, false], ['', false], ['identity', false], ['gzip;q=0', false],
    ['gzip;q=0.000', false], ['gzip;Q=0.0', false], ['br', false], ['gzipped', false],
    ['xgzip', false], ['*;q=0, identity', false], ['gzip;q=0, *', false],
    ['deflate;q=1, br', false],
];

for (const [accept, zipped] of ENCODINGS)
    test(`Accept-Encoding: ${accept ?? '(none)'} gets ${zipped ? 'the .gz' : 'the file'}`, async () => {
        const { status, headers, body } = await get('/app.js',
            accept === undefined ? {} : { 'Accept-Encoding': accept });
        assert.equal(status, 200);
        assert.match(headers['content-type'], /^text\/javascript/);
        assert.match(headers.vary ?? '', /\bAccept-Encoding\b/i);
        assert.equal(headers['content-encoding'], zipped ? 'gzip' : undefined);
        assert.deepEqual(body, zipped ? gzipSync(SCRIPT) : Buffer.from(SCRIPT));
    });

test('The .gz has a tag of its own, and its own 304', async () => {
    const plain = await get('/app.js');
    const zipped = await get('/app.js', { 'Accept-Encoding': 'gzip' });
    assert.notEqual(plain.headers.etag, zipped.headers.etag);
    const again = (etag, encoding) => get('/app.js',
        { 'If-None-Match': etag, 'Accept-Encoding': encoding });
    assert.equal((await again(zipped.headers.etag, 'gzip')).status, 304);
    assert.equal((await again(plain.headers.etag, 'identity')).status, 304);
    assert.equal((await again(plain.headers.etag, 'gzip')).status, 200);
    assert.equal((await again(zipped.headers.etag, 'identity')).status, 200);
});

test('What has no .gz comes as it is', async () => {
    const { status, headers, body } = await get('/alphabet.txt',
        { 'Accept-Encoding': 'gzip' });
    assert.deepEqual([status, body.toString()], [200, ALPHABET]);
    assert.equal(headers['content-encoding'], undefined);
});

test('A symlink out of DIR is no precompressed file', async () => {
    put('zip.txt', 'plain\n');
    fs.symlinkSync('../secret.txt', path.join(www, 'zip.txt.gz'));
    const { status, body } = await get('/zip.txt', { 'Accept-Encoding': 'gzip' });
    assert.deepEqual([status, body.toString()], [200, 'plain\n']);
});

// ----- no way out ----------------------------------------------------------

const WAYS_OUT = [
    '/../secret.txt', '/sub/../../secret.txt', '/./../secret.txt', '/..',
    '/%2e%2e/secret.txt', '/%2E./secret.txt', '/.%2e/secret.txt',
    '/..%2fsecret.txt', '/..%2Fsecret.txt', '/%2e%2e%2fsecret.txt',
    '/sub%2f..%2f..%2fsecret.txt', '/sub/%2e%2e/%2e%2e/secret.txt',
    '/..%5csecret.txt', '/..\\secret.txt', '/sub\\..\\..\\secret.txt',
    '/%252e%252e/secret.txt', '/%252e%252e%252fsecret.txt', '/%c0%ae%c0%ae/secret.txt',
    '/%c0%ae%c0%ae%c0%afsecret.txt', '/..%c0%afsecret.txt', '/..%00/secret.txt',
    '/alphabet.txt%00', '/alphabet.txt%00.html', '/%00', '/..;/secret.txt',
    '//secret.txt', '///etc/passwd', '//etc/passwd', '/%2fetc/passwd', '/%2Fetc%2Fpasswd',
    `/${outside}/secret.txt`, `${outside}/secret.txt`, '/../www-secret/secret.txt',
    '/-secret/secret.txt', '/link.txt', '/absolute.txt', '/up/secret.txt',
    '/up', '/up/', '/up/www/alphabet.txt', '/root/etc/passwd', '/root/', '/sub/link.txt',
    '/sub/../up/secret.txt', '/...//../secret.txt', '/.../secret.txt',
    '/sub/..%2f..%2fsecret.txt?x', '/sub/;/../../secret.txt', '/proc/self/environ',
    '/.%00./secret.txt', '/%', '/%2', '/%zz', '/alphabet.txt#', '/\x01',
];

test('No path leads out of DIR', async () => {
    for (const where of WAYS_OUT) {
        const head = `GET ${where} HTTP/1.1\r\nHost: localhost\r\n` +
            'Connection: close\r\n\r\n';
        const { status, rest, socket } = await handshake(server, '', { head });
        let body = rest.toString('latin1');
        for await (const chunk of socket.setEncoding('latin1'))
            body += chunk;
        assert.ok([301, 400, 403, 404].includes(status), `${where}: ${status}`);
        assert.ok(!body.includes(SECRET.trim()), where);
        assert.doesNotMatch(body, /root:|PATH=|abcdef/, where);
    }
});

test('Dot segments within DIR lead nowhere strange', async () => {
    for (const where of ['/sub/../alphabet.txt', '/./alphabet.txt',
        '/sub/%2e%2e/alphabet.txt']) {
        const head = `GET ${where} HTTP/1.1\r\nHost: localhost\r\n\r\n`;
        const { status, socket } = await handshake(server, '', { head });
        socket.destroy();
        assert.ok([200, 301, 400, 404].includes(status), `${where}: ${status}`);
    }
});

test('A redirect for a slash never leads to another host', async () => {
    fs.mkdirSync(path.join(www, 'evil.example'));
    fs.mkdirSync(path.join(www, '\\evil.example'));
    for (const where of ['//evil.example', '/%2fevil.example', '/\\evil.example',
        '/%5cevil.example', '///evil.example', '/sub/..//evil.example']) {
        const head = `GET ${where} HTTP/1.1\r\nHost: localhost\r\n\r\n`;
        const { status, headers, socket } = await handshake(server, '', { head });
        socket.destroy();
        assert.ok(status < 500);
        assert.doesNotMatch(headers.location ?? '/', /^(\/[/\\]|[^/])/, where);
    }
});

test('The folder may be a symlink and relative itself', async (t) => {
    const dir = temporaryFolder(t);
    fs.symlinkSync(www, path.join(dir, 'link'));
    const here = path.relative(process.cwd(), path.join(dir, 'link'));
    const other = await startServer(t, { args: ['--www', here] });
    assert.equal((await other.get('/alphabet.txt')).body, ALPHABET);
    assert.equal((await other.get('/up/secret.txt')).status, 404);
});

// ----- downloads -----------------------------------------------------------

const BIG = crypto.randomBytes(20 << 20);
const bigFile = put('big.bin', BIG);
const hash = (data) => crypto.createHash('sha1').update(data).digest('hex');

test('Four downloads of 20 MB arrive whole while a channel stays quick', { timeout: 60000 * SLOW }, async () => {
    const peer = await server.connect('/ws/quick?echo=1');
    let busy = true, slowest = 0, rounds = 0;
    const downloads = Promise.all([1, 2, 3, 4].map(() => get('/big.bin')))
        .finally(() => (busy = false));
    while (busy) {
        const sent = performance.now();
        await peer.text(`${rounds++}`);
        await peer.message();
        slowest = Math.max(slowest, performance.now() - sent);
        await setTimeout(2);
    }
    for (const { status, body } of await downloads) {
        assert.equal(status, 200);
        assert.equal(hash(body), hash(BIG));
    }
    assert.ok(rounds > 10, `only ${rounds} messages went round`);
    assert.ok(slowest < 1000 * SLOW, `a message took ${slowest} ms`);
});

test('A range in the middle of a big file is the middle', async () => {
    const { status, body } = await get('/big.bin', { Range: 'bytes=10000000-19999999' });
    assert.equal(status, 206);
    assert.equal(hash(body), hash(BIG.subarray(10000000, 20000000)));
});

test('A reader that takes its time gets everything', { timeout: 60000 * SLOW }, async () => {
    const socket = await open(server);
    socket.write('GET /big.bin HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n');
    const chunks = [];
    let pauses = 0, since = 0;
    for await (const chunk of socket) {
        chunks.push(chunk);
        if ((since += chunk.length) > 2 << 20) {
            since = 0;
            pauses++;
            await setTimeout(50);
        }
    }
    const all = Buffer.concat(chunks);
    assert.ok(pauses > 5);
    assert.equal(hash(all.subarray(all.indexOf('\r\n\r\n') + 4)), hash(BIG));
});

// Begins a download, stops reading, changes the file, reads on. Gives all bytes
// of the body that came.
async function meanwhile(where, change) {
    const { status, headers, rest, socket } = await server.handshake(where);
    assert.equal(status, 200);
    await setTimeout(200);
    change();
    await setTimeout(50);
    const chunks = [rest];
    let have = rest.length;
    const size = Number(headers['content-length']);
    await new Promise((resolve) => {
        socket.on('data', (chunk) => {
            chunks.push(chunk);
            if ((have += chunk.length) >= size)
                resolve();
        });
        socket.once('end', resolve).once('close', resolve);
    });
    socket.destroy();
    return { size, body: Buffer.concat(chunks) };
}

test('A file that shrinks under way ends its connection and nothing else', async () => {
    const peer = await server.connect('/ws/shrink?echo=1');
    const file = put('shrinks.bin', BIG);
    const { size, body } = await meanwhile('/shrinks.bin',
        () => fs.truncateSync(file, 1 << 20));
    assert.ok(body.length < size, 'more came than there was');
    assert.equal(hash(body), hash(BIG.subarray(0, body.length)));
    await peer.text('well');
    assert.equal((await peer.message()).text, 'well');
    assert.equal((await get('/shrinks.bin')).body.length, 1 << 20);
});

test('A file that vanishes or is replaced under way never yields wrong bytes', async () => {
    const peer = await server.connect('/ws/vanish?echo=1');
    for (const change of [fs.unlinkSync, (file) => {
        fs.writeFileSync(`${file}.new`, Buffer.alloc(BIG.length, 'x'));
        fs.renameSync(`${file}.new`, file);
    }]) {
        const file = put('vanishes.bin', BIG);
        const { body } = await meanwhile('/vanishes.bin', () => change(file));
        assert.equal(hash(body), hash(BIG.subarray(0, body.length)));
    }
    await peer.text('well');
    assert.equal((await peer.message()).text, 'well');
});

test('A file that grows under way ends where its length said', async () => {
    const file = put('grows.bin', BIG);
    const { size, body } = await meanwhile('/grows.bin',
        () => fs.appendFileSync(file, Buffer.alloc(1 << 20, 'x')));
    assert.equal(body.length, size);
    assert.equal(hash(body), hash(BIG));
});

test('A download that is broken off leaves no descriptor behind', async () => {
    const descriptors = () => fs.readdirSync(`/proc/${server.pid}/fd`)
        .filter((fd) => {
            try {
                return fs.readlinkSync(`/proc/${server.pid}/fd/${fd}`) === bigFile;
            } catch {
                return false;
            }
        }).length;
    const sockets = await Promise.all(Array.from({ length: 8 }, () => open(server)));
    for (const socket of sockets)
        socket.pause().write('GET /big.bin HTTP/1.1\r\nHost: localhost\r\n\r\n');
    for (const until = Date.now() + 3000 * SLOW; descriptors() === 0;) {
        assert.ok(Date.now() < until, 'the file was never opened');
        await setTimeout(10);
    }
    sockets.forEach((socket) => socket.destroy());
    for (const until = Date.now() + 3000 * SLOW; descriptors() > 0;) {
        assert.ok(Date.now() < until, `${descriptors()} are still open`);
        await setTimeout(10);
    }
});

test('Without --www there are no files', async (t) => {
    const bare = await startServer(t);
    for (const where of ['/index.html', '/alphabet.txt', '/sub/', '/etc/passwd'])
        assert.equal((await bare.get(where)).status, 404);
});

test('A --www that is no folder stops the start', async (t) => {
    for (const dir of ['/nonexistent-folder', bigFile]) {
        const broken = await startServer(t, { args: ['--www', dir], ready: false });
        const { code } = await broken.gone;
        broken.expectedExit = code;
        assert.ok(code > 0);
        assert.ok(broken.log.some((line) =>
            line.startsWith('error: ') && line.includes(dir)), broken.describe());
    }
});
