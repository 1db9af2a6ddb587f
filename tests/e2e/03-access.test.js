// SPDX-License-Identifier: MIT
// Goal: everybody may do what the token file, the Origin rules, the Host rules
// and the limits say, and nothing else; who loses a right loses it at once; and
// no token ever reaches the log.

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import crypto from 'node:crypto';
import { renameSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import WebSocket from 'ws';
import { OP, SLOW, frame } from './lib/raw.js';
import { BINARY, startServer, temporaryFolder } from './lib/server.js';

const TOKEN = {
    none: 'token-that-nobody-knows', reader: 'token-of-a-reader',
    writer: 'token-of-a-writer', admin: 'token-of-an-admin',
    team: 'token-of-team-one', mixed: 'token-with-several-lines',
    doc: 'token-for-documents',
};
const sha256 = (text) => crypto.createHash('sha256').update(text).digest('hex');
const line = (who, right, pattern) => `${sha256(TOKEN[who])} ${right} ${pattern}`;

const LINES = [
    '# who may do what',
    '',
    line('reader', 'read', '*'),
    line('writer', 'write', '*'),
    `  ${line('admin', 'admin', '*')}`.replaceAll(' ', ' \t'),
    line('team', 'write', 'ws/team-1'),
    line('team', 'write', 'ws/lesson-*'),
    line('mixed', 'read', '*'),
    line('mixed', 'write', 'ws/board'),
    line('mixed', 'read', 'ws/board'),
    line('doc', 'admin', 'doc/*'),
];

function tokenFile(t, lines = LINES) {
    const file = path.join(temporaryFolder(t), 'tokens');
    const write = (text) => {
        writeFileSync(`${file}.new`, text, { mode: 0o600 });
        renameSync(`${file}.new`, file);
    };
    write(`${lines.join('\n')}\n`);
    return { file, write };
}

async function guarded(t, { lines, args = [], ...opt } = {}) {
    const { file, write } = tokenFile(t, lines);
    const server = await startServer(t,
        { args: ['--tokens', file, ...args], ...opt });
    return Object.assign(server, { tokensFile: file, writeTokens: write });
}

const bearer = (who) =>
    (who ? { Authorization: `Bearer ${TOKEN[who] ?? who}` } : {});
const from = (address) => ({ 'X-Forwarded-For': address });

async function assertWrites(peer) {
    await peer.text('may I?');
    assert.equal((await peer.message()).text, 'may I?');
}

async function assertClosed(peer, code, reason = /./) {
    const end = await peer.closed();
    assert.equal(end.code, code);
    assert.match(end.reason, reason);
    assert.deepEqual(end.frames, []);
}

// The answer to an upgrade, or to whatever `headers` make of it.
const UPGRADE = {
    Connection: 'Upgrade', Upgrade: 'websocket', 'Sec-WebSocket-Version': '13',
    'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ==',
};
async function upgradeStatus(server, headers, where = '/ws/x') {
    const answer = await server.handshake(where, { headers });
    answer.socket.destroy();
    return answer.status;
}

// ----- tokens --------------------------------------------------------------

// who, channel, what happens: 'writes', 'reads', or the code of the Close.
const RIGHTS = [
    ['reader', 'x', 'reads'], ['reader', 'a/b', 'reads'],
    ['writer', 'x', 'writes'], ['writer', 'a/b', 'writes'],
    ['admin', 'x', 'writes'],
    ['team', 'team-1', 'writes'], ['team', 'lesson-2', 'writes'],
    ['team', 'lesson-', 'writes'], ['team', 'team-12', 4403],
    ['team', 'team-', 4403], ['team', 'Team-1', 4403], ['team', 'x', 4403],
    ['team', 'lesson', 4403], ['team', 'xlesson-2', 4403],
    ['mixed', 'board', 'writes'], ['mixed', 'other', 'reads'],
    ['doc', 'x', 4403], ['doc', 'doc/x', 4403],
    ['none', 'x', 4401], [null, 'x', 4401],
];

test('Each token may do what its lines say', async (t) => {
    const server = await guarded(t);
    for (const [who, channel, outcome] of RIGHTS)
        await t.test(`${who} on ${channel}: ${outcome}`, async () => {
            const peer = await server.connect(`/ws/${channel}?echo=1`,
                { headers: bearer(who) });
            if (outcome === 'writes')
                return assertWrites(peer);
            if (outcome !== 'reads')
                return assertClosed(peer, outcome);
            const writer = await server.connect(`/ws/${channel}`,
                { headers: bearer('writer') });
            await writer.text('news');
            assert.equal((await peer.message()).text, 'news');
            await peer.text('mine');
            await assertClosed(peer, 4403, /read only/);
            await writer.silent();
        });
});

test('A reader may send control frames, but no message, not even an empty one', async (t) => {
    const server = await guarded(t);
    const reader = await server.connect('/ws/x', { headers: bearer('reader') });
    await reader.ping('alive');
    const pong = await reader.next();
    assert.deepEqual([pong.opcode, pong.text], [OP.PONG, 'alive']);
    await reader.binary('');
    await assertClosed(reader, 4403, /read only/);
});

test('A token that is refused sees no message and disturbs nobody', async (t) => {
    const server = await guarded(t);
    const writer = await server.connect('/ws/x', { headers: bearer('writer') });
    const refused = await server.connect('/ws/x?history=10', {
        headers: bearer('none'), with: frame(OP.TEXT, 'sneaked in behind the head'),
    });
    await writer.text('secret');
    await assertClosed(refused, 4401);
    await writer.silent();
});

test('A token may come as Bearer, in the query or as a cookie', async (t) => {
    const server = await guarded(t);
    const page = await server.get(`/healthz?token=${TOKEN.writer}`);
    const cookie = page.headers['set-cookie']?.[0].split(';')[0];
    assert.ok(cookie, 'no cookie was set');
    const ways = [
        ['/ws/x?echo=1', { Authorization: `Bearer ${TOKEN.writer}` }],
        ['/ws/x?echo=1', { Authorization: `bEARER  ${TOKEN.writer}` }],
        [`/ws/x?echo=1&token=${TOKEN.writer}`, {}],
        [`/ws/x?token=${TOKEN.writer.replaceAll('-', '%2D')}&echo=1`, {}],
        ['/ws/x?echo=1', { Cookie: cookie }],
        ['/ws/x?echo=1', { Cookie: `other=1; ${cookie}; more="2"` }],
        [`/ws/x?echo=1&token=${TOKEN.writer}`, { Cookie: cookie }],
    ];
    for (const [where, headers] of ways)
        await t.test(`${where} ${JSON.stringify(headers)}`, async () =>
            assertWrites(await server.connect(where, { headers })));
    // Somebody got a new link after the old token was taken back.
    await t.test('A token in the address beats an old cookie', async () =>
        assertWrites(await server.connect(`/ws/x?echo=1&token=${TOKEN.writer}`,
            { headers: { Cookie: cookie.replace(TOKEN.writer, TOKEN.none) } })));

    const name = cookie.split('=')[0];
    const wrongWays = [
        ['/ws/x', { Authorization: `Basic ${TOKEN.writer}` }],
        ['/ws/x', { Authorization: TOKEN.writer }],
        ['/ws/x', { Authorization: 'Bearer' }],
        ['/ws/x', { Authorization: `Bearer ${sha256(TOKEN.writer)}` }],
        ['/ws/x', { Authorization: `Bearer ${TOKEN.writer}x` }],
        ['/ws/x', { Authorization: `Bearer ${TOKEN.writer.slice(0, -1)}` }],
        [`/ws/x?TOKEN=${TOKEN.writer}`, {}],
        [`/ws/x?xtoken=${TOKEN.writer}`, {}],
        ['/ws/x?token=', {}],
        ['/ws/x', { Cookie: `x${cookie}` }],
        ['/ws/x', { Cookie: `${name}=` }],
        ['/ws/x', { Cookie: `other="; ${name}x=1"` }],
    ];
    for (const [where, headers] of wrongWays)
        await t.test(`Not as ${where} ${JSON.stringify(headers)}`, async () =>
            assertClosed(await server.connect(where, { headers }), 4401));
});

test('A line with a hash of zeros gives a client without a token nothing', async (t) => {
    const server = await guarded(t, { lines: [`${'0'.repeat(64)} admin *`],
        args: ['--trust-proxy', '127.0.0.1'] });
    const foreigner = from('198.51.100.7');
    assert.equal((await server.get('/metrics', foreigner)).status, 401);
    for (const where of ['/ws/x', '/ws/x?token='])
        await assertClosed(await server.connect(where, { headers: foreigner }), 4401);
});

test('A browser sees the Close code of a token that is refused', async (t) => {
    const server = await guarded(t);
    const browser = new WebSocket(`${server.url}/ws/x?token=${TOKEN.none}`);
    const [code] = await new Promise((resolve, reject) => {
        browser.on('close', (...all) => resolve(all)).on('error', reject);
    });
    assert.equal(code, 4401);
});

test('A page opened with a token gets a cookie and an address without it', async (t) => {
    const www = temporaryFolder(t);
    writeFileSync(path.join(www, 'index.html'), 'hello\n');
    const server = await guarded(t, { args: ['--www', www], tls: true });
    const cases = [
        [`/?token=${TOKEN.writer}`, '/'],
        [`/index.html?token=${TOKEN.writer}`, '/index.html'],
        [`/index.html?a=1&token=${TOKEN.writer}&b=%20`, '/index.html?a=1&b=%20'],
        [`/index.html?token=${TOKEN.writer}&b`, '/index.html?b'],
        [`/index.html?a&token=${TOKEN.writer}`, '/index.html?a'],
        [`/in%64ex.html?token=${TOKEN.writer}`, /^\/in(%64|d)ex\.html$/],
    ];
    for (const [where, wanted] of cases) {
        const { status, headers } = await server.get(where);
        assert.ok([302, 303, 307].includes(status), `${where}: ${status}`);
        if (wanted instanceof RegExp)
            assert.match(headers.location, wanted);
        else
            assert.equal(headers.location, wanted);
        assert.equal(headers['set-cookie'].length, 1);
        const [pair, ...attributes] = headers['set-cookie'][0].split(/; */);
        const has = attributes.map((a) => a.toLowerCase());
        assert.ok(pair.includes(TOKEN.writer) && !headers.location.includes('token'));
        assert.ok(has.includes('httponly'), headers['set-cookie'][0]);
        assert.ok(has.includes('samesite=strict'), headers['set-cookie'][0]);
        assert.ok(has.includes('path=/'), headers['set-cookie'][0]);
        assert.ok(!has.includes('secure'), 'Secure without TLS');
        assert.match(headers['cache-control'] ?? '', /no-store/);
        const then = await server.get(headers.location, { Cookie: pair });
        assert.deepEqual([then.status, then.body], [200, 'hello\n']);
    }
});

test('Over TLS the cookie is Secure', async (t) => {
    const server = await guarded(t, { tls: true });
    const { get } = await import('node:https');
    const headers = await new Promise((resolve, reject) => {
        get({ host: '127.0.0.1', port: server.tlsPort, ca: server.certificate.ca,
            path: `/healthz?token=${TOKEN.writer}`, agent: false },
        (answer) => {
            answer.resume();
            resolve(answer.headers);
        }).on('error', reject);
    });
    assert.match(headers['set-cookie'][0], /;\s*Secure(;|$)/i);
});

test('A page opened with an unknown token gets no cookie', async (t) => {
    const server = await guarded(t);
    for (const token of [TOKEN.none, '', 'x;Path=/', 'a%0d%0aX-Bad:%201']) {
        const { status, headers } = await server.get(`/healthz?token=${token}`);
        assert.equal(headers['set-cookie'], undefined, token);
        assert.equal(headers['x-bad'], undefined);
        assert.ok(![302, 303, 307].includes(status), `${status}`);
    }
});

test('A redirect never leads to another host', async (t) => {
    const server = await guarded(t);
    for (const where of ['//evil.example/', '/%2Fevil.example', '/\\evil.example']) {
        const { headers } = await server.get(`${where}?token=${TOKEN.writer}`);
        assert.doesNotMatch(headers.location ?? '/', /^(\/[/\\]|[a-z]+:)/, where);
    }
});

test('Without --tokens everyone may write and needs no token', async (t) => {
    const server = await startServer(t);
    await assertWrites(await server.connect('/ws/x?echo=1'));
    await assertWrites(await server.connect('/ws/x?echo=1',
        { headers: bearer('none') }));
});

test('Without --tokens a listener that is not private is warned of', async (t) => {
    const server = await startServer(t, { listen: '0.0.0.0:0' });
    await server.waitForLog(/^warning: .*--tokens/);
    const quiet = await startServer(t);
    assert.ok(!quiet.log.some((text) => text.startsWith('warning: ')), quiet.describe());
});

// token, address behind the trusted proxy (null: it named none), expected
// status.
const METRICS = [
    [null, null, [401]], ['reader', null, [403]], ['admin', null, [200]],
    ['admin', '198.51.100.7', [200]],
    ['writer', '198.51.100.7', [403]], ['team', '198.51.100.7', [403]],
    ['doc', '198.51.100.7', [403]],
    ['none', '198.51.100.7', [401]], [null, '198.51.100.7', [401]],
    [null, '2001:db8::7', [401]], [null, 'garbage', [400, 401]],
    [null, '198.51.100.7, 127.0.0.1', [401]],
    [null, '127.0.0.1, 198.51.100.7', [401]],
];

test('/metrics needs an admin or loopback, /healthz nothing', async (t) => {
    const server = await guarded(t, { args: ['--trust-proxy', '127.0.0.1'] });
    const peer = await server.connect('/ws/secret-name', { headers: bearer('writer') });
    for (const [who, address, statuses] of METRICS) {
        const headers = { ...bearer(who), ...(address ? from(address) : {}) };
        const { status, headers: got, body } = await server.get('/metrics', headers);
        assert.ok(statuses.includes(status), `${who} from ${address}: ${status}`);
        if (status === 401)
            assert.match(got['www-authenticate'], /^Bearer\b/);
        if (status !== 200)
            assert.doesNotMatch(body, /collabd_clients/);

        const health = await server.get('/healthz', address ? from(address) : {});
        if (address !== 'garbage')
            assert.equal(health.status, 200);
        assert.doesNotMatch(health.body, /secret-name/);
    }
    await peer.silent();
});

test('With --tokens loopback gets /metrics without one', async (t) => {
    const server = await guarded(t);
    for (const headers of [{}, bearer('reader'), from('198.51.100.7')])
        assert.equal((await server.get('/metrics', headers)).status, 200);
});

test('Without --tokens no foreigner gets /metrics', async (t) => {
    const server = await startServer(t, { args: ['--trust-proxy', '127.0.0.1'] });
    const { status } = await server.get('/metrics', from('198.51.100.7'));
    assert.ok([401, 403].includes(status), `got ${status}`);
});

test('X-Forwarded-For of somebody who is not trusted changes nothing', async (t) => {
    for (const args of [[], ['--trust-proxy', '203.0.113.1'], ['--trust-proxy', 'unix']]) {
        const server = await startServer(t, { args: ['--max-per-ip', '1', ...args] });
        const peers = await Promise.all([1, 2, 3].map(() =>
            server.connect('/ws/x', { headers: from('198.51.100.7') })));
        assert.equal((await server.get('/metrics', from('198.51.100.7'))).status, 200);
        await peers[0].silent();
    }
});

// ----- reload --------------------------------------------------------------

test('SIGHUP cuts off whose right is gone, and nobody else', async (t) => {
    const server = await guarded(t);
    const open = (who, where) => server.connect(where, { headers: bearer(who) });
    const team = await open('team', '/ws/team-1');
    const lesson = await open('team', '/ws/lesson-1?echo=1');
    const reader = await open('reader', '/ws/team-1');
    const writer = await open('writer', '/ws/team-1');
    server.writeTokens(`${[
        line('team', 'write', 'ws/lesson-*'), line('writer', 'write', '*'),
        line('none', 'write', '*'),
    ].join('\n')}\n`);
    server.signal('SIGHUP');
    await assertClosed(reader, 4401);
    await assertClosed(team, 4403);
    await assertWrites(lesson);
    await writer.silent();
    await assertWrites(await open('none', '/ws/x?echo=1'));
    await assertClosed(await open('reader', '/ws/x'), 4401);
});

test('A writer who became a reader is not heard any more', async (t) => {
    const server = await guarded(t);
    const was = await server.connect('/ws/x', { headers: bearer('writer') });
    const stays = await server.connect('/ws/x', { headers: bearer('admin') });
    server.writeTokens(`${line('writer', 'read', '*')}\n${line('admin', 'admin', '*')}\n`);
    server.signal('SIGHUP');
    await server.waitForLog(/^info: .*reload/i);
    await was.text('as before');
    assert.equal((await was.closed()).code, 4403);
    await stays.silent();
});

test('A reader who became a writer may write at the latest when it comes again', async (t) => {
    const server = await guarded(t);
    const old = await server.connect('/ws/x', { headers: bearer('reader') });
    server.writeTokens(`${line('reader', 'write', '*')}\n`);
    server.signal('SIGHUP');
    await server.waitForLog(/^info: .*reload/i);
    await old.silent();
    await assertWrites(await server.connect('/ws/x?echo=1', { headers: bearer('reader') }));
});

// A broken file: at start and at reload refused with file and line.
const BROKEN = [
    ['a hash that is too short', `${'a'.repeat(63)} read *`],
    ['a hash that is too long', `${'a'.repeat(65)} read *`],
    ['a hash that is not hexadecimal', `${'g'.repeat(64)} read *`],
    ['an unknown right', `${'a'.repeat(64)} own *`],
    ['a right in capitals', `${'a'.repeat(64)} READ *`],
    ['no pattern', `${'a'.repeat(64)} read`],
    ['only a hash', 'a'.repeat(64)],
    ['a pattern of another kind', `${'a'.repeat(64)} read room/*`],
    ['a pattern without its kind', `${'a'.repeat(64)} read x`],
    ['one word too many', `${'a'.repeat(64)} read ws/a ws/b`],
    ['a NUL', `${'a'.repeat(64)} read ws/a\0b`],
    ['a pattern longer than any name', `${'a'.repeat(64)} read ws/${'x'.repeat(1000)}`],
];

test('A failed reload keeps the old state and says where the fault is', async (t) => {
    const server = await guarded(t);
    const peer = await server.connect('/ws/x?echo=1', { headers: bearer('writer') });
    const said = () => server.log.filter((text) =>
        /^(error|warning): /.test(text) && text.includes(server.tokensFile));
    for (const [what, bad] of BROKEN)
        await t.test(`it has ${what}`, async () => {
            const before = said().length;
            server.writeTokens(`# first\n${line('none', 'admin', '*')}\n${bad}\n`);
            server.signal('SIGHUP');
            for (const until = Date.now() + 3000 * SLOW; said().length === before;) {
                assert.ok(Date.now() < until, `nothing was said; ${server.describe()}`);
                await setTimeout(10);
            }
            assert.match(said().at(-1), /tokens\D{1,12}3\b/);
            await assertWrites(peer);
            await assertClosed(await server.connect('/ws/x',
                { headers: bearer('none') }), 4401);
        });
    await t.test('and a good file works again', async () => {
        server.writeTokens(`${line('none', 'write', '*')}\n`);
        server.signal('SIGHUP');
        await assertClosed(peer, 4401);
        await assertWrites(await server.connect('/ws/x?echo=1',
            { headers: bearer('none') }));
    });
});

test('A broken token file stops the start and the line is named', (t) => {
    const { file, write } = tokenFile(t);
    for (const [what, bad] of BROKEN) {
        write(`\n# two\n\n${bad}\n`);
        const run = spawnSync(BINARY, ['--check', '--tokens', file],
            { encoding: 'utf8', timeout: 5000 * SLOW });
        assert.ok(run.status > 0, `${what}: exit ${run.status}`);
        assert.match(run.stderr, /^error: .*tokens\D{1,12}4\b/m, what);
    }
    const none = spawnSync(BINARY, ['--check', '--tokens', `${file}-none`],
        { encoding: 'utf8', timeout: 5000 * SLOW });
    assert.ok(none.status > 0);
    assert.match(none.stderr, /^error: .*tokens-none/m);
});

test('More lines than there is room for stop the start', (t) => {
    const { file, write } = tokenFile(t);
    const lines = (count) => Array.from({ length: count },
        (_, i) => `${sha256(`${i}`)} read ws/${i}\n`).join('');
    const check = () => spawnSync(BINARY, ['--check', '--tokens', file],
        { encoding: 'utf8', timeout: 5000 * SLOW });
    write(lines(256));
    assert.equal(check().status, 0, check().stderr);
    write(lines(257));
    const run = check();
    assert.ok(run.status > 0);
    assert.match(run.stderr, /^error: .*(256|COLLABD_TOKENS)/m);
});

test('--make-token prints a token and a line that work as they are', async (t) => {
    const made = [1, 2].map(() =>
        spawnSync(BINARY, ['--make-token'], { encoding: 'utf8', timeout: 5000 * SLOW }));
    const [one, two] = made.map(({ status, stdout, stderr }) => {
        assert.equal(status, 0);
        const ready = stdout.match(/([0-9a-f]{64}) (read|write|admin) \S+$/m);
        assert.ok(ready, stdout);
        assert.equal(stdout, `${ready[0]}\n`, 'it cannot be appended to a file');
        const token = stderr.split(/[\s"'=]+/).find((word) => sha256(word) === ready[1]);
        assert.ok(token, 'no word of the output is the token of the line');
        assert.ok(token.length >= 20, 'the token is short');
        assert.match(token, /^[\w.~-]+$/, 'the token cannot stand in a URL as it is');
        return { token, line: ready[0], right: ready[2] };
    });
    assert.notEqual(one.token, two.token);
    const server = await guarded(t, { lines: [one.line] });
    const peer = await server.connect(`/ws/x?echo=1&token=${one.token}`);
    if (one.right !== 'read')
        await assertWrites(peer);
    await peer.silent();
    await assertClosed(await server.connect(`/ws/x?token=${two.token}`), 4401);
});

test('No token ever reaches the log', async (t) => {
    const server = await guarded(t, { args: ['--log-level', 'debug'] });
    for (const token of Object.values(TOKEN)) {
        await server.get(`/healthz?token=${token}`);
        await server.get('/metrics', { Authorization: `Bearer ${token}` });
        await server.get(`/nothing?token=${token}&x`, { Cookie: `token=${token}` });
        await server.get(`/ws/x?token=${token}`);
        await server.get(`/%zz?token=${token}`);
        await server.get(`/${token}%00?token=${token}`);
        await server.get('/', { Origin: 'http://evil.example', Authorization: token }, 'POST');
        const peer = await server.connect(`/ws/x?token=${token}`);
        await peer.send(frame(OP.TEXT, token, { mask: false }));
        await peer.closed();
    }
    await server.stop();
    assert.ok(server.log.length > 20, 'nothing was logged at all');
    for (const token of Object.values(TOKEN))
        assert.deepEqual(server.log.filter((text) =>
            text.includes(token) || text.includes(sha256(token))), []);
});

// ----- Origin --------------------------------------------------------------

// [--origin settings, Host, Origin, allowed]
const ORIGINS = [
    [[], 'localhost', null, true],
    [[], 'localhost', 'http://localhost', true],
    [[], 'localhost:8080', 'http://localhost:8080', true],
    [[], 'localhost:8080', 'http://localhost:3000', true],
    [[], 'localhost', 'https://localhost', true],
    [[], 'LocalHost', 'http://LOCALHOST:1', true],
    [[], '127.0.0.1:80', 'http://127.0.0.1:3000', true],
    [[], '[::1]:8080', 'http://[::1]:3000', true],
    [[], 'box.local', 'http://box.local', true],
    [[], 'localhost', 'http://127.0.0.1', false],
    [[], '127.0.0.1', 'http://localhost', false],
    [[], 'box.local', 'http://other.local', false],
    [[], 'box.local', 'http://box.local.evil.example', false],
    [[], 'box.local', 'http://xbox.local', false],
    [[], 'box.local', 'http://box.local@evil.example', false],
    [[], 'box.local', 'http://evil.example/box.local', false],
    [[], 'box.local', 'http://evil.example#box.local', false],
    [[], 'box.local', 'http://box', false],
    [[], 'localhost', 'null', false],
    [[], 'null', 'null', false],
    [[], 'localhost', '', false],
    [[], 'localhost', 'localhost', false],
    [[], 'localhost', '*', false],
    [[], 'localhost', 'http://', false],
    [[], 'localhost', 'http://localhost http://evil.example', false],
    [[], 'localhost', ['http://localhost', 'http://evil.example'], false],
    [[], 'localhost', ['http://evil.example', 'http://localhost'], false],

    [['http://app.example'], 'localhost', 'http://app.example', true],
    [['http://app.example'], 'localhost', 'http://APP.example', true],
    [['http://app.example'], 'localhost', 'http://app.example:80', true],
    [['http://app.example:80'], 'localhost', 'http://app.example', true],
    [['https://app.example:443'], 'localhost', 'https://app.example', true],
    [['http://app.example'], 'localhost', 'http://localhost', true],
    [['http://app.example'], 'localhost', 'https://app.example', false],
    [['http://app.example'], 'localhost', 'http://app.example:8080', false],
    [['http://app.example:8080'], 'localhost', 'http://app.example', false],
    [['http://app.example:8080'], 'localhost', 'http://app.example:8080', true],
    [['http://app.example'], 'localhost', 'http://app.example.evil.example', false],
    [['http://app.example'], 'localhost', 'http://xapp.example', false],
    [['http://app.example'], 'localhost', 'null', false],

    [['app.example'], 'localhost', 'http://app.example', true],
    [['app.example'], 'localhost', 'https://app.example:8443', true],
    [['app.example'], 'localhost', 'http://sub.app.example', false],

    [['http://a.example', 'http://b.example'], 'localhost', 'http://b.example', true],
    [['null'], 'localhost', 'null', true],
    [['null'], 'localhost', 'http://evil.example', false],
    [['*'], 'localhost', 'http://evil.example', true],
    [['*'], 'localhost', 'https://any.thing:1234', true],
    [['capacitor://localhost'], 'box', 'capacitor://localhost', true],
];

test('A browser may come from where the Origin rules say', async (t) => {
    const servers = new Map();
    for (const [settings, host, origin, allowed] of ORIGINS)
        await t.test(`[${settings}] Host ${host}, Origin ${origin}`, async () => {
            const key = settings.join();
            if (!servers.has(key))
                servers.set(key, await startServer(t,
                    { args: settings.flatMap((o) => ['--origin', o]) }));
            const server = servers.get(key);
            const status = await upgradeStatus(server, { Host: host, Origin: origin });
            if (allowed)
                assert.equal(status, 101);
            else
                assert.ok([400, 403].includes(status), `got ${status}`);
            if (Array.isArray(origin))
                return;

            // The same holds for whatever is not GET or HEAD.
            const headers = origin === null ? { host } : { host, origin };
            const post = await server.get('/healthz', headers, 'POST');
            assert.equal(post.status === 403 || post.status === 400, !allowed,
                `POST got ${post.status}`);
            // Reading what is open is no harm, but other pages do not see it.
            const get = await server.get('/healthz', headers);
            assert.ok(get.status === 200 || (!allowed && get.status < 500));
        });
});

test('A refusal names exactly the --origin that would allow it', async (t) => {
    const server = await startServer(t);
    for (const origin of ['http://evil.example', 'https://evil.example:8443',
        'null', 'http://[2001:db8::1]:80', 'capacitor://evil']) {
        const { status, body } = await server.get('/ws/x',
            { ...UPGRADE, Host: 'localhost', Origin: origin });
        assert.equal(status, 403);
        const named = body.match(/--origin[ =](\S*[^\s.,;:)"'])/)?.[1];
        assert.equal(named?.replace(/^["']/, ''), origin.replace(/^(http:.*):80$/,
            (all, short) => (body.includes(all) ? all : short)));
        const helped = await startServer(t, { args: ['--origin', named] });
        assert.equal(await upgradeStatus(helped, { Origin: origin }), 101);
    }
});

test('An Origin full of signs is not repeated as it is', async (t) => {
    const server = await startServer(t);
    const { body } = await server.get('/ws/x',
        { ...UPGRADE, Host: 'localhost', Origin: 'http://a"\'<script>;$(id)`' });
    assert.doesNotMatch(body, /[<`]|\$\(/);
});

test('Origins that are listed get CORS fields, others none', async (t) => {
    const listed = 'http://app.example:3000';
    const www = temporaryFolder(t);
    writeFileSync(path.join(www, 'file.txt'), 'hello\n');
    const server = await startServer(t, { args: ['--origin', listed, '--www', www] });
    const cors = async (origin, method = 'GET', headers = {}, where = '/healthz') => {
        const answer = await server.get(where,
            { Host: 'localhost', ...(origin && { Origin: origin }), ...headers }, method);
        const allow = answer.headers['access-control-allow-origin'];
        return { ...answer, allow, vary: answer.headers.vary ?? '' };
    };
    const good = await cors(listed);
    assert.equal(good.allow, listed);
    assert.match(good.vary, /\bOrigin\b/i);
    const missing = await cors(listed, 'GET', {}, '/nothing');
    assert.deepEqual([missing.status, missing.allow], [404, listed]);
    for (const origin of ['http://evil.example', 'http://app.example', 'null', null]) {
        assert.equal((await cors(origin)).allow, undefined, `${origin}`);
        // A cache must not give this answer to the listed origin.
        const file = await cors(origin, 'GET', {}, '/file.txt');
        assert.deepEqual([file.status, file.allow], [200, undefined]);
        assert.match(file.vary, /\bOrigin\b/i);
    }

    const ask = {
        'Access-Control-Request-Method': 'GET',
        'Access-Control-Request-Headers': 'authorization',
    };
    const preflight = await cors(listed, 'OPTIONS', ask);
    assert.ok([200, 204].includes(preflight.status), `${preflight.status}`);
    assert.equal(preflight.allow, listed);
    assert.match(preflight.headers['access-control-allow-methods'], /\bGET\b/);
    assert.match(preflight.headers['access-control-allow-headers'], /authorization/i);
    const refused = await cors('http://evil.example', 'OPTIONS', ask);
    assert.equal(refused.status, 403);
    assert.equal(refused.allow, undefined);
});

test('With --origin * every origin gets CORS fields', async (t) => {
    const server = await startServer(t, { args: ['--origin', '*'] });
    const { headers } = await server.get('/healthz', { Origin: 'http://a.example' });
    assert.ok(['*', 'http://a.example'].includes(headers['access-control-allow-origin']));
});

// ----- Host ----------------------------------------------------------------

const HOSTS = {
    200: [
        '127.0.0.1', '127.0.0.1:8080', '192.168.1.5', '8.8.8.8:1', '[::1]',
        '[::1]:8080', '[fd00::1:2]', '[2001:db8::1]:443', 'localhost',
        'LOCALHOST:1234', 'box', 'box:8080', 'my-box_2', os.hostname(),
        os.hostname().toUpperCase(), 'box.local', 'BOX.LOCAL:80', 'a.b.local',
        'box.lan', 'box.home.arpa', 'box.internal', 'collab.example',
        'COLLAB.example:8080', 'other.example',
    ],
    421: [
        'evil.example', 'evil.example:8080', 'x.collab.example',
        'collab.example.evil.example', 'collab.examples', 'localhost.evil.example',
        '127.0.0.1.evil.example', '127.0.0.1.nip.io', 'local.example',
        'box.xlocal', 'box.local.example', 'box.home.arpa.example',
        'home.arpa.example', 'box.arpa', 'box.internals', 'a.b',
    ],
};

test('A host is served if it cannot be a stranger\'s name for us', async (t) => {
    const server = await startServer(t,
        { args: ['--host', 'collab.example', '--host', 'other.example'] });
    for (const [status, hosts] of Object.entries(HOSTS))
        for (const host of hosts)
            await t.test(`${host} gets ${status}`, async () => {
                const get = await server.get('/healthz', { host });
                assert.equal(get.status, Number(status));
                const up = await upgradeStatus(server, { Host: host });
                assert.equal(up, status === '200' ? 101 : 421);
                if (status === '421')
                    assert.ok(get.body.includes(`--host ${host.replace(/:\d+$/, '')}`),
                        get.body);
            });
});

test('The host of an absolute target is the one that counts', async (t) => {
    const server = await startServer(t);
    const evil = await server.handshake('http://evil.example/ws/x');
    evil.socket.destroy();
    assert.equal(evil.status, 421);
    const origin = await server.handshake('http://box.local/ws/x', { headers: {
        Host: 'localhost', Origin: 'http://localhost',
    } });
    origin.socket.destroy();
    assert.equal(origin.status, 403);
});

// ----- limits --------------------------------------------------------------

test('--max-clients refuses with 503 and recovers', async (t) => {
    const server = await startServer(t, { args: ['--max-clients', '3'] });
    const peers = await Promise.all([1, 2, 3].map(() => server.connect('/ws/x')));
    for (let i = 0; i < 3; i++)
        assert.equal(await upgradeStatus(server, {}), 503);
    await peers[0].close(1000);
    await peers[0].closed();
    await setTimeout(1200);     // the listener may have been left alone for 1 s
    const again = await server.connect('/ws/x');
    await peers[1].text('still one room');
    assert.equal((await again.message()).text, 'still one room');
    assert.equal((await peers[2].message()).text, 'still one room');
});

test('--max-per-ip counts each address, IPv6 by /64, and not loopback', async (t) => {
    const server = await startServer(t, { args: ['--max-per-ip', '2',
        '--trust-proxy', '127.0.0.1', '--trust-proxy', '203.0.113.1,203.0.113.2'] });
    // X-Forwarded-For of clients that stay, then whether one more is refused.
    const table = [
        [['198.51.100.1', '198.51.100.1'], '198.51.100.1', true],
        [[], '198.51.100.2', false],
        [[], '198.51.100.1, 198.51.100.3', false],
        [[], '198.51.100.3, 198.51.100.1', true],
        [[], '198.51.100.1, 203.0.113.1', true],
        [[], '198.51.100.3,198.51.100.1 , 203.0.113.1,  203.0.113.2', true],
        [[], ['198.51.100.3', '198.51.100.1'], true],
        [[], ['198.51.100.1', '198.51.100.3'], false],
        [[], '::ffff:198.51.100.1', true],
        [['2001:db8::1', '2001:db8::2'], '2001:db8::ffff:1', true],
        [[], '2001:DB8:0:0:5:6:7:8', true],
        [[], '2001:db8:0:1::1', false],
        [[], '2001:db9::1', false],
    ];
    const stay = [];
    for (const [staying, address, refused] of table) {
        for (const one of staying)
            stay.push(await server.connect('/ws/x', { headers: from(one) }));
        assert.equal(await upgradeStatus(server, from(address)),
            refused ? 429 : 101, `${address}`);
    }
    stay[0].close(1000);
    await stay[0].closed();
    // the server may see the end a moment after the client
    let status = 429;
    for (let tries = 0; status !== 101 && tries < 100; tries++) {
        await setTimeout(20 * SLOW);
        status = await upgradeStatus(server, from('198.51.100.1'));
    }
    assert.equal(status, 101);
    const local = await Promise.all([1, 2, 3, 4].map(() => server.connect('/ws/x')));
    await local[0].silent();
});

test('X-Forwarded-For that is no list of addresses is refused or counts as its proxy\'s', async (t) => {
    const server = await startServer(t, { args: ['--trust-proxy', '127.0.0.1'] });
    for (const bad of ['garbage', '1.2.3', '1.2.3.4.5', '300.1.1.1', '1:2:3', ',',
        'unknown', '198.51.100.1, ', 'x'.repeat(500)]) {
        const status = await upgradeStatus(server, from(bad));
        assert.ok([101, 400].includes(status), `${bad}: ${status}`);
    }
    await assertWrites(await server.connect('/ws/x?echo=1'));
});

// One read may bring several small messages, and what was read is used up: so
// these are big enough to be read one by one.
const COUNT = 30, SIZE = 3000;

for (const [flag, limit] of [['--rate-messages', '10'], ['--rate-bytes', '30000']])
    test(`A client over ${flag} is slowed down, and no message is lost`, { timeout: 30000 * SLOW }, async (t) => {
        const server = await startServer(t, { args: [flag, limit] });
        const member = await server.connect('/ws/x');
        const sender = await server.connect('/ws/x');
        const other = await server.connect('/ws/y?echo=1');
        const started = Date.now();
        for (let i = 0; i < COUNT; i++)
            sender.text(`${i} `.padEnd(SIZE, '.'));
        await sender.ping('behind them all');
        const soon = Date.now();
        await assertWrites(other);
        assert.ok(Date.now() - soon < 500 * SLOW, 'another client had to wait');
        const got = await member.messages(COUNT, 20000);
        const took = Date.now() - started;
        assert.deepEqual(got.map((m) => parseInt(m.text, 10)),
            Array.from({ length: COUNT }, (_, i) => i));
        assert.ok(took > 900, `all came within ${took} ms`);
        assert.ok(took < 8000 * SLOW, `it took ${took} ms`);
        assert.equal((await sender.next(5000 * SLOW)).opcode, OP.PONG);
        await sender.silent();
    });

test('A client under its rates is not slowed down', async (t) => {
    const server = await startServer(t,
        { args: ['--rate-messages', '100', '--rate-bytes', '1M'] });
    const peer = await server.connect('/ws/x?echo=1');
    const started = Date.now();
    for (let i = 0; i < 20; i++)
        await assertWrites(peer);
    assert.ok(Date.now() - started < 500 * SLOW);
});

test('HTTP requests over --rate-messages get 429, and then are served again', async (t) => {
    const server = await startServer(t, { args: ['--rate-messages', '5'] });
    const { Agent, get } = await import('node:http');
    const agent = new Agent({ keepAlive: true, maxSockets: 1 });
    t.after(() => agent.destroy());
    const ask = () => new Promise((resolve, reject) => {
        get({ port: server.port, host: '127.0.0.1', path: '/healthz', agent }, (answer) => {
            let body = '';
            answer.setEncoding('utf8').on('data', (chunk) => (body += chunk))
                .on('end', () => resolve({ status: answer.statusCode, body }));
        }).on('error', reject);
    });
    const answers = [];
    for (let i = 0; i < 40; i++)
        answers.push(await ask());
    const refused = answers.filter(({ status }) => status === 429);
    assert.equal(answers[0].status, 200);
    assert.ok(refused.length > 10, `${refused.length} of 40 were refused`);
    assert.match(refused[0].body, /--rate-messages/);
    await setTimeout(2500);
    assert.equal((await ask()).status, 200);
});
