// SPDX-License-Identifier: MIT
// Goal: whoever runs collabd gets what it promises: every mistake in a setting
// is refused at once with its name, place and remedy; signals, sockets, limits,
// supervision and privileges work as in the manual; and a server without work
// does none.

import assert from 'node:assert/strict';
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { OP, SLOW, connect, frame, open } from './lib/raw.js';
import { BINARY, startServer, temporaryFolder } from './lib/server.js';

const ROOT = process.getuid() === 0;

// The words on a server's command line that ends by itself.
const run = (...words) => spawnSync(BINARY, words,
    { encoding: 'utf8', timeout: 10000 * SLOW });

// One `error:` line that matches all of `patterns`, and a failure.
function assertRefused({ status, stdout, stderr }, ...patterns) {
    assert.ok(status > 0, `exit ${status}: ${stderr}`);
    const errors = stderr.split('\n').filter((line) => line.startsWith('error: '));
    assert.equal(errors.length, 1, stderr);
    assert.equal(stdout, '');
    for (const pattern of patterns)
        assert.match(errors[0], pattern);
    assert.doesNotMatch(stderr, /^info: ready/m);
}

const proc = ({ pid }, file) => fs.readFileSync(`/proc/${pid}/${file}`, 'utf8');
const status = (server, name) =>
    proc(server, 'status').match(new RegExp(`^${name}:\\s*(.*)$`, 'm'))[1];

// Times that any thread went to sleep, which is how often it had woken up.
const wakeups = ({ pid }) => fs.readdirSync(`/proc/${pid}/task`).reduce((sum, task) =>
    sum + Number(fs.readFileSync(`/proc/${pid}/task/${task}/status`, 'utf8')
        .match(/^voluntary_ctxt_switches:\s*(\d+)/m)[1]), 0);

// CPU time in milliseconds (the kernel counts hundredths of a second).
function cpu(server) {
    const fields = proc(server, 'stat').replace(/^.*\) /, '').split(' ');
    return (Number(fields[11]) + Number(fields[12])) * 10;
}

async function waitFor(condition, what, ms = 4000 * SLOW) {
    for (const until = Date.now() + ms; !await condition();) {
        assert.ok(Date.now() < until, `not within ${ms} ms: ${what}`);
        await setTimeout(10);
    }
}

async function echoes(peer, text = 'are you there?') {
    await peer.text(text);
    assert.equal((await peer.message()).text, text);
}

// ----- flags ---------------------------------------------------------------

const SETTINGS = [
    'listen', 'tls-listen', 'tls-cert', 'tls-key', 'unix-mode', 'tokens', 'origin',
    'host', 'trust-proxy', 'www', 'data', 'fsync', 'write-budget', 'doc-memory',
    'max-doc', 'gc', 'yjs-at-root', 'max-clients', 'max-rooms', 'max-per-ip',
    'max-message', 'max-tls', 'max-handshakes', 'max-requests', 'receive-buffers',
    'ring', 'message-memory', 'socket-buffer', 'memory', 'rate-messages',
    'rate-bytes', 'coalesce', 'ping-interval', 'dead-after', 'request-timeout',
    'log-level', 'syslog', 'user', 'chroot', 'prefault', 'config',
];
const ACTIONS = ['check', 'version', 'help', 'show-memory', 'make-cert', 'make-token',
    'list', 'fsck', 'export', 'import', 'delete'];

test('--help lists every setting and every action once', () => {
    const { status: code, stdout, stderr } = run('--help');
    assert.deepEqual([code, stderr], [0, '']);
    const listed = [...stdout.matchAll(/^ +--([a-z-]+)/gm)].map(([, name]) => name);
    assert.deepEqual(listed.toSorted(), [...SETTINGS, ...ACTIONS].sort());
});

test('--version names the server and its library for TLS', () => {
    const { status: code, stdout, stderr } = run('--version');
    assert.deepEqual([code, stderr], [0, '']);
    assert.match(stdout, /^collabd \d+\.\d+\.\d+$/m);
    assert.match(stdout, /mbed ?TLS [23]\.\d+/i);
});

test('--check accepts good settings without listening', async (t) => {
    const server = await startServer(t);
    const good = run('--check', '--listen', `127.0.0.1:${server.port}`,
        '--ring=64K', '--origin', 'http://a.example', '--origin=*');
    assert.equal(good.status, 0, good.stderr);
    assert.doesNotMatch(good.stderr, /error|ready/);
});

// words, then what the error must name.
const BAD_FLAGS = [
    [['--no-such-setting', '1'], /no-such-setting/],
    [['--max-client', '1'], /max-client/],
    [['-p', '8080'], /-p/],
    [['8080'], /8080/],
    [['--'], /--/],
    [['--listen'], /listen/],
    [['--max-clients'], /max-clients/],
    [['--max-clients='], /max-clients/],
    [['--syslog=perhaps'], /syslog/],
    ...['x', '-1', '+1', '0', '1.5', ' 5', '5 ', '0x10', '99999999999999999999999',
        '18446744073709551617', '65001', '1e3'].map((bad) =>
        [['--max-clients', bad], /max-clients/]),
    ...['1T', '1KB', 'K', '1k1', '-1K', '17179869184G', '1 K'].map((bad) =>
        [['--max-message', bad], /max-message/]),
    [['--ring', '100K'], /ring.*(power|65536|64K|128K)/],
    [['--ring', '1'], /ring/],
    [['--unix-mode', '999'], /unix-mode/],
    [['--unix-mode', '10660'], /unix-mode/],
    [['--log-level', 'loud'], /log-level.*loud|loud.*log-level/],
    [['--log-level', 'INFO'], /log-level/],
    [['--ping-interval', '50', '--dead-after', '50'], /dead-after/],
    [['--request-timeout', '0'], /request-timeout/],
    ...['70000', '-1', 'localhost:x', '127.0.0.1:', '127.0.0.1:65536', '[::1', '[::1]',
        '[::1]x:1', '::1:80', 'unix:', '1.2.3.4.5:80', '256.1.1.1:80', 'http://x:80', ''].map(
        (bad) => [['--listen', bad], /listen/]),
    [['--listen', `unix:/tmp/${'x'.repeat(200)}`], /listen|unix|xxx/],
    [['--tls-listen', '127.0.0.1:0'], /tls-cert/],
    [['--tls-listen', '127.0.0.1:0', '--tls-cert', '/dev/null'], /tls-key/],
    [['--origin', 'http://a.example/path'], /origin/],
    [['--origin', 'http://'], /origin/],
    [['--host', 'http://a.example'], /host/],
    [['--host', 'a b'], /host/],
    [['--trust-proxy', 'somewhere'], /trust-proxy/],
    [['--trust-proxy', '300.1.1.1'], /trust-proxy/],
    [['--user', 'no-such-user-here'], /no-such-user-here/],
    [['--tokens', '/nonexistent/tokens'], /\/nonexistent\/tokens/],
    [['--www', '/nonexistent/www'], /\/nonexistent\/www/],
    [['--config', '/nonexistent/conf'], /\/nonexistent\/conf/],
];

for (const [words, ...patterns] of BAD_FLAGS)
    test(`"${words.join(' ').slice(0, 60)}" is refused by name`, () => {
        assertRefused(run('--check', ...words), ...patterns);
    });

test('More listeners than there is room for are refused', () => {
    const many = Array.from({ length: 9 }, () => ['--listen', '127.0.0.1:0']).flat();
    assertRefused(run('--check', ...many), /listen/);
});

test('More settings than there is room for are refused', () => {
    const many = Array.from({ length: 200 }, (_, i) =>
        ['--origin', `http://${'x'.repeat(50)}${i}.example`]).flat();
    assertRefused(run('--check', ...many), /origin|settings|COLLABD_/);
});

// ----- the config file -----------------------------------------------------

function config(t, ...lines) {
    const file = path.join(temporaryFolder(t), 'collabd.conf');
    fs.writeFileSync(file, `${lines.join('\n')}\n`);
    return file;
}

test('A config file sets what flags set, lists add up, and flags win', async (t) => {
    const file = config(t, '# first', '', 'max-clients = 1', '  ring=128K  ',
        'origin = http://a.example', '\torigin\t=\thttp://b.example', 'log-level = error');
    const server = await startServer(t,
        { args: ['--config', file, '--max-clients', '2', '--log-level=info'] });
    const upgrade = (origin) => server.connect('/ws/x', { headers: { Origin: origin } });
    const first = await upgrade('http://a.example');
    await upgrade('http://b.example');
    await assert.rejects(server.connect('/ws/x'), { status: 503 });
    await first.silent();
});

test('A config file may name the listeners', async (t) => {
    const file = config(t, 'listen = 127.0.0.1:0', 'listen = [::1]:0');
    const server = await startServer(t, { listen: null, args: ['--config', file] });
    assert.equal(server.addresses.length, 2);
    assert.match(server.addresses[1], /^http:\/\/\[::1\]:\d+/);
    assert.equal((await server.get('/healthz')).status, 200);
});

const BAD_LINES = [
    ['no-such-key = 1', /no-such-key/], ['max-clients', /max-clients/],
    ['max-clients =', /max-clients/], ['max-clients = many', /max-clients/],
    ['max-clients = 0', /max-clients/], ['= 5', /./], ['--max-clients = 5', /./],
    ['max-clients 5', /max-clients/], ['max clients = 5', /./], ['MAX-CLIENTS = 5', /./],
    ['check = 1', /check/], ['a\0b = 1', /./], [`${'x'.repeat(5000)} = 1`, /./],
    ['ring = 100K', /ring/], ['listen = nowhere:x', /listen/],
    ['log-level = loud', /log-level/],
];

for (const [line, pattern] of BAD_LINES)
    test(`The config line "${line.slice(0, 30)}" is refused by file and line`, (t) => {
        const file = config(t, '# a comment', 'ring = 64K', line, 'max-rooms = 3');
        assertRefused(run('--check', '--config', file), /collabd\.conf\D{1,12}3\b/, pattern);
    });

test('A config file that is a folder or is not there is refused', (t) => {
    const dir = temporaryFolder(t);
    assertRefused(run('--check', '--config', dir), new RegExp(dir));
    assertRefused(run('--check', '--config', `${dir}/none`), new RegExp(`${dir}/none`));
});

// ----- memory --------------------------------------------------------------

function memory(...words) {
    const { status: code, stdout, stderr } = run('--show-memory', ...words);
    assert.equal(code, 0, stderr);
    const rows = [];
    for (const line of stdout.split('\n')) {
        const row = line.match(/^(\S.*?)\s+(?:\d+\s+)*(\d+)$/);
        if (row?.[1] === 'sum')
            return { rows, sum: Number(row[2]) };
        if (row)
            rows.push(Number(row[2]));
    }
    assert.fail(`there is no sum in\n${stdout}`);
}

test('--show-memory adds up', () => {
    for (const words of [[], ['--max-clients', '1000', '--max-message', '16M']]) {
        const { rows, sum } = memory(...words);
        assert.ok(rows.length > 5);
        assert.equal(rows.reduce((a, b) => a + b), sum);
    }
});

test('Every limit that takes memory shows in the sum', () => {
    const { sum } = memory();
    for (const more of ['--max-clients=1000', '--max-rooms=100', '--ring=1M',
        '--max-message=16M', '--message-memory=64M', '--max-requests=200',
        '--receive-buffers=100'])
        assert.ok(memory(more).sum > sum, more);
});

test('--memory below the sum is refused with the sum', () => {
    const { sum } = memory();
    assertRefused(run('--check', '--memory', '1M'), /memory/, new RegExp(`\\b${sum}\\b`));
    assertRefused(run('--check', `--memory=${sum - 1}`), /memory/);
    assert.equal(run('--check', `--memory=${sum}`).status, 0);
});

test('--prefault touches all memory at start, but that of documents', {
    skip: !ROOT && 'needs root' }, async (t) => {
    const server = await startServer(t, { args: ['--prefault', '--doc-memory=1M'] });
    assert.ok(parseInt(status(server, 'VmRSS'), 10) * 1024 >
        (memory('--doc-memory=1M').sum - 2 ** 20) * 0.9);
});

// ----- listening -----------------------------------------------------------

test('Port 0 picks a port for each listener and prints it', async (t) => {
    const server = await startServer(t, { args: ['--listen', '127.0.0.1:0',
        '--listen=[::1]:0'] });
    const ports = server.addresses.map((a) => Number(a.match(/:(\d+)$/)[1]));
    assert.equal(new Set(ports).size, 3);
    assert.match(server.addresses[2], /^http:\/\/\[::1\]:/);
    for (const [i, host] of ['127.0.0.1', '127.0.0.1', '::1'].entries())
        await echoes(await connect({ port: ports[i], host, sockets: server.sockets },
            '/ws/x?echo=1'), `${i}`);
});

test('An address in use is said so, and names the address', async (t) => {
    const server = await startServer(t);
    const busy = `127.0.0.1:${server.port}`;
    assertRefused(run('--listen', busy), new RegExp(busy), /in use/i);
    assert.equal((await server.get('/healthz')).status, 200);
});

test('An address that is not ours is refused', () => {
    assertRefused(run('--listen', '203.0.113.77:0'), /203\.0\.113\.77/);
});

const unixServer = (t, file, ...args) =>
    startServer(t, { listen: `unix:${file}`, args });
const modeOf = (file) => fs.statSync(file).mode & 0o777;

test('A unix socket serves, has its mode, and goes with the server', async (t) => {
    const file = path.join(temporaryFolder(t), 'sock');
    const server = await unixServer(t, file);
    assert.ok(server.log.includes(`info: listening on unix:${file}`), server.describe());
    assert.equal(modeOf(file), 0o660);
    const place = { unix: file, sockets: server.sockets };
    const peer = await connect(place, '/ws/x?echo=1');
    await echoes(peer);
    await echoes(await connect(place, '/ws/y?echo=1'));
    await server.stop();
    assert.ok(!fs.existsSync(file), 'the socket is still there');
});

test('--unix-mode sets the mode, whatever the umask', async (t) => {
    const dir = temporaryFolder(t);
    const old = process.umask(0o177);
    t.after(() => process.umask(old));
    for (const mode of ['0600', '0666', '0777', '660']) {
        const file = path.join(dir, mode);
        await unixServer(t, file, '--unix-mode', mode);
        assert.equal(modeOf(file), parseInt(mode, 8), mode);
    }
});

test('A stale unix socket is replaced', async (t) => {
    const file = path.join(temporaryFolder(t), 'sock');
    const killed = await unixServer(t, file);
    await killed.kill();
    assert.ok(fs.existsSync(file));
    const server = await unixServer(t, file);
    await echoes(await connect({ unix: file, sockets: server.sockets }, '/ws/x?echo=1'));
});

test('A unix socket that lives is not taken away', async (t) => {
    const file = path.join(temporaryFolder(t), 'sock');
    const server = await unixServer(t, file);
    assertRefused(run('--listen', `unix:${file}`), /sock/, /in use/i);
    await echoes(await connect({ unix: file, sockets: server.sockets }, '/ws/x?echo=1'));
});

test('What is no socket is not removed', (t) => {
    const file = path.join(temporaryFolder(t), 'sock');
    fs.writeFileSync(file, 'precious');
    assertRefused(run('--listen', `unix:${file}`), /sock/);
    assert.equal(fs.readFileSync(file, 'utf8'), 'precious');
    assertRefused(run('--listen', `unix:${file}-none/sock`), /sock-none/);
});

// ----- signals -------------------------------------------------------------

test('SIGTERM says 1001 to everyone and ends within two seconds', async (t) => {
    const server = await startServer(t);
    const polite = await Promise.all([1, 2, 3].map(() => server.connect('/ws/x')));
    const rude = await server.connect('/ws/x', { autoClose: false });
    const deaf = await server.connect('/ws/x');
    deaf.pause();
    const half = await server.connect('/ws/x');
    await half.send(frame(OP.TEXT, 'never whole').subarray(0, 5));
    const request = await open(server);
    request.write('GET /healthz HT');
    await polite[0].binary(Buffer.alloc(100000));
    const started = Date.now();
    server.signal('SIGTERM');
    for (const peer of [...polite, rude]) {
        const { code } = await peer.closed();
        assert.equal(code, 1001);
    }
    const { code } = await server.gone;
    assert.equal(code, 0);
    assert.ok(Date.now() - started < 2500 * SLOW, `it took ${Date.now() - started} ms`);
    assert.equal((await half.closed()).code, 1001);
});

test('What was accepted before SIGTERM still arrives', async (t) => {
    const server = await startServer(t);
    const [sender, member] = await Promise.all([1, 2].map(() => server.connect('/ws/x')));
    for (let i = 0; i < 50; i++)
        sender.text(`${i}`);
    await sender.ping('sent');
    await sender.next();
    server.signal('SIGTERM');
    const { code, frames } = await member.closed();
    assert.equal(code, 1001);
    assert.deepEqual(frames.map((f) => f.text), Array.from({ length: 50 }, (_, i) => `${i}`));
});

test('While it drains nobody new gets in', async (t) => {
    const server = await startServer(t);
    const rude = await server.connect('/ws/x', { autoClose: false });
    server.signal('SIGTERM');
    await rude.next();
    await assert.rejects(server.connect('/ws/x'));
    await server.gone;
});

for (const signal of ['SIGTERM', 'SIGINT'])
    test(`Without clients ${signal} ends the server at once, with 0`, async (t) => {
        const server = await startServer(t);
        const started = Date.now();
        server.signal(signal);
        assert.deepEqual(await server.gone, { code: 0, signal: null });
        assert.ok(Date.now() - started < 500 * SLOW, `it took ${Date.now() - started} ms`);
    });

test('When all clients have left, draining ends', async (t) => {
    const server = await startServer(t);
    const peers = await Promise.all([1, 2, 3].map(() => server.connect('/ws/x')));
    const started = Date.now();
    server.signal('SIGTERM');
    await Promise.all(peers.map((peer) => peer.closed()));
    await server.gone;
    assert.ok(Date.now() - started < 1000 * SLOW, `it took ${Date.now() - started} ms`);
});

test('A second SIGTERM changes nothing', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect('/ws/x');
    server.signal('SIGTERM');
    server.signal('SIGTERM');
    assert.equal((await peer.closed()).code, 1001);
    assert.equal((await server.gone).code, 0);
});

test('SIGHUP reads the config file again and drops nobody', async (t) => {
    const file = config(t, 'origin = http://a.example', 'max-clients = 10');
    const server = await startServer(t, { args: ['--config', file] });
    const peer = await server.connect('/ws/x?echo=1');
    const from = (origin) => server.connect('/ws/x', { headers: { Origin: origin } });
    await assert.rejects(from('http://b.example'), { status: 403 });

    fs.writeFileSync(file, 'origin = http://b.example\nmax-clients = 10\n');
    server.signal('SIGHUP');
    await waitFor(() => from('http://b.example').then(() => true, () => false),
        'the new origin is let in');
    await assert.rejects(from('http://a.example'), { status: 403 });
    await echoes(peer);

    fs.writeFileSync(file, 'origin = http://a.example\nmax-clients = none\n');
    server.signal('SIGHUP');
    await server.waitForLog(/^error: .*collabd\.conf\D{1,12}2\b/);
    await server.waitForLog(/^error: .*reload/i);
    await from('http://b.example');
    await assert.rejects(from('http://a.example'), { status: 403 });
    await echoes(peer);
});

test('SIGHUP with a setting that needs a restart says so', async (t) => {
    const file = config(t, 'max-rooms = 10');
    const server = await startServer(t, { args: ['--config', file] });
    fs.writeFileSync(file, 'max-rooms = 20\n');
    server.signal('SIGHUP');
    await server.waitForLog(/^(warning|error): .*max-rooms/);
    await echoes(await server.connect('/ws/x?echo=1'));
});

test('A hundred SIGHUPs in a row do no harm', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect('/ws/x?echo=1');
    for (let i = 0; i < 100; i++) {
        server.signal('SIGHUP');
        if (i % 10 === 0)
            await echoes(peer, `${i}`);
    }
});

// ----- supervision ---------------------------------------------------------

// A unix datagram socket, which Node has not: what came is in `lines`.
async function notifySocket(t, where) {
    const child = spawn('python3', ['-uc', [
        'import socket, sys',
        's = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)',
        's.bind(sys.argv[1].replace("@", "\\0"))',
        'print("bound")',
        'while True:',
        '    print(s.recv(4096).decode().strip().replace("\\n", " "))',
    ].join('\n'), where], { stdio: ['ignore', 'pipe', 'inherit'] });
    t.after(() => child.kill());
    const lines = [];
    createInterface({ input: child.stdout }).on('line', (line) => lines.push(line));
    await waitFor(() => lines.includes('bound'), 'the notify socket is bound', 10000);
    return lines;
}

test('The supervisor is told READY, WATCHDOG and STOPPING', async (t) => {
    for (const where of [path.join(temporaryFolder(t), 'notify'),
        `@collabd-test-${process.pid}`]) {
        const lines = await notifySocket(t, where);
        const server = await startServer(t,
            { env: { NOTIFY_SOCKET: where, WATCHDOG_USEC: '400000' } });
        await waitFor(() => lines.some((l) => /\bREADY=1\b/.test(l)), 'READY=1');
        await server.connect('/ws/x');
        const before = lines.length;
        await setTimeout(1500);
        const dogs = lines.slice(before).filter((l) => /\bWATCHDOG=1\b/.test(l)).length;
        assert.ok(dogs >= 4, `WATCHDOG=1 came ${dogs} times in 1.5 s`);
        assert.ok(dogs <= 20, `WATCHDOG=1 came ${dogs} times in 1.5 s`);
        await server.stop();
        await waitFor(() => lines.some((l) => /\bSTOPPING=1\b/.test(l)), 'STOPPING=1');
    }
});

test('A watchdog meant for another process is not fed', async (t) => {
    const where = path.join(temporaryFolder(t), 'notify');
    const lines = await notifySocket(t, where);
    await startServer(t, { env: { NOTIFY_SOCKET: where, WATCHDOG_USEC: '100000',
        WATCHDOG_PID: '1' } });
    await waitFor(() => lines.some((l) => /\bREADY=1\b/.test(l)), 'READY=1');
    await setTimeout(500);
    assert.ok(!lines.some((l) => /WATCHDOG/.test(l)), lines.join());
});

test('A supervisor that is gone is no reason to stop', async (t) => {
    const server = await startServer(t, { env: { WATCHDOG_USEC: '100000',
        NOTIFY_SOCKET: path.join(temporaryFolder(t), 'nobody') } });
    await setTimeout(300);
    await echoes(await server.connect('/ws/x?echo=1'));
});

// ----- privileges ----------------------------------------------------------

const NOBODY = { skip: !ROOT && 'needs root' };

test('--user and --chroot leave nothing but what is needed', NOBODY, async (t) => {
    const jail = temporaryFolder(t), dir = temporaryFolder(t);
    const www = path.join(dir, 'www'), tokens = path.join(dir, 'tokens');
    fs.mkdirSync(www);
    [jail, dir].forEach((d) => fs.chmodSync(d, 0o755));
    fs.writeFileSync(path.join(www, 'page.txt'), 'page\n');
    const writeTokens = (secret) => {
        const hash = execFileSync('sha256sum', { input: secret, encoding: 'utf8' });
        fs.writeFileSync(`${tokens}.new`, `${hash.slice(0, 64)} write *\n`, { mode: 0o644 });
        fs.renameSync(`${tokens}.new`, tokens);
    };
    writeTokens('first');
    const where = path.join(dir, 'notify');
    const lines = await notifySocket(t, where);
    fs.chmodSync(where, 0o666);
    const server = await startServer(t, {
        args: ['--user', 'nobody', '--chroot', jail, '--www', www, '--tokens', tokens],
        // A sanitizer cannot look for leaks where there is no /proc.
        env: { NOTIFY_SOCKET: where,
            ASAN_OPTIONS: `${process.env.ASAN_OPTIONS ?? ''}:detect_leaks=0` },
    });
    await waitFor(() => lines.some((l) => /\bREADY=1\b/.test(l)), 'READY=1');

    const uid = execFileSync('id', ['-u', 'nobody'], { encoding: 'utf8' }).trim();
    const gid = execFileSync('id', ['-g', 'nobody'], { encoding: 'utf8' }).trim();
    assert.deepEqual(status(server, 'Uid').split(/\s+/), Array(4).fill(uid));
    assert.deepEqual(status(server, 'Gid').split(/\s+/), Array(4).fill(gid));
    assert.deepEqual(status(server, 'Groups').split(/\s+/).filter((g) => g && g !== gid), []);
    assert.match(status(server, 'CapEff'), /^0+$/);
    assert.equal(fs.readlinkSync(`/proc/${server.pid}/root`), jail);
    assert.equal(fs.readlinkSync(`/proc/${server.pid}/cwd`), jail);

    const as = (token) => server.connect('/ws/x?echo=1',
        { headers: { Authorization: `Bearer ${token}` } });
    const first = await as('first');
    await echoes(first);
    assert.equal((await server.get('/page.txt')).body, 'page\n');
    writeTokens('second');
    server.signal('SIGHUP');
    assert.equal((await first.closed()).code, 4401);
    await echoes(await as('second'));
    await server.stop();
    await waitFor(() => lines.some((l) => /\bSTOPPING=1\b/.test(l)), 'STOPPING=1');
});

test('--check finds what --user could not read', NOBODY, (t) => {
    const dir = temporaryFolder(t);
    const tokens = path.join(dir, 'tokens');
    fs.chmodSync(dir, 0o755);
    fs.writeFileSync(tokens, '# none\n', { mode: 0o600 });
    assert.equal(run('--check', '--tokens', tokens).status, 0);
    assertRefused(run('--check', '--user', 'nobody', '--tokens', tokens), /tokens/);
    fs.chmodSync(tokens, 0o644);
    const good = run('--check', '--user', 'nobody', '--tokens', tokens);
    assert.equal(good.status, 0, good.stderr);
    const www = path.join(dir, 'www');
    fs.mkdirSync(www, { mode: 0o700 });
    assertRefused(run('--check', '--user', 'nobody', '--www', www), /www/);
});

// ----- descriptors and slots -----------------------------------------------

// The server under another program, which starts it in its own process.
async function startUnder(t, wrapper, args) {
    const [program, ...words] = [...wrapper, BINARY, '--listen', '127.0.0.1:0', ...args];
    const child = spawn(program, words, { stdio: ['ignore', 'ignore', 'pipe'] });
    const gone = once(child, 'close');
    t.after(() => (child.kill(), gone));
    const log = [];
    createInterface({ input: child.stderr }).on('line', (line) => log.push(line));
    await waitFor(() => log.includes('info: ready'), `ready: ${log.join('\n')}`);
    return { pid: child.pid, port: Number(log.join('\n').match(/127\.0\.0\.1:(\d+)/)[1]) };
}

test('Limits that need more descriptors than there can be are refused with the sum', () => {
    const { status: code, stderr } = spawnSync('prlimit', ['--nofile=64:64', BINARY,
        '--listen', '127.0.0.1:0', '--max-clients', '100'],
    { encoding: 'utf8', timeout: 5000 * SLOW });
    assert.ok(code > 0, stderr);
    const [error] = stderr.split('\n').filter((line) => line.startsWith('error: '));
    assert.match(error, /\b64\b/);
    assert.match(error, /max-clients/);
    const numbers = error.match(/\d+/g).map(Number);
    assert.ok(numbers.some((n) => n > 100 && n < 1000), `no sum in: ${error}`);
});

test('The soft limit of descriptors is raised as far as it is needed', async (t) => {
    const server = await startUnder(t, ['prlimit', '--nofile=64:4096'], []);
    const soft = Number(proc(server, 'limits').match(/^Max open files\s+(\d+)/m)[1]);
    assert.ok(soft > 256, `it is ${soft}`);
    const peers = await Promise.all(Array.from({ length: 150 }, () =>
        connect(server, '/ws/x')));
    await peers[0].text('all in');
    await Promise.all(peers.slice(1).map((peer) => peer.message()));
    peers.forEach((peer) => peer.socket.destroy());
});

test('Out of slots: newcomers get 503, nothing spins, and it recovers', async (t) => {
    const server = await startServer(t, { args: ['--max-clients', '4'] });
    const inside = await Promise.all([1, 2, 3, 4].map(() => server.connect('/ws/x?echo=1')));
    const waiting = await Promise.all(Array.from({ length: 60 }, () => open(server)));
    let refused = 0;
    for (const socket of waiting)
        socket.setEncoding('latin1').on('data', (text) =>
            (refused += text.startsWith('HTTP/1.1 503 ')));
    const [before, woken] = [cpu(server), wakeups(server)];
    await setTimeout(2000);
    assert.ok(refused >= 5, `${refused} were refused in 2 s`);
    assert.ok(refused <= 40, `${refused} were refused in 2 s`);
    assert.ok(cpu(server) - before <= 200, `${cpu(server) - before} ms of CPU time`);
    assert.ok(wakeups(server) - woken < 300, `${wakeups(server) - woken} wake-ups`);
    await echoes(inside[3]);
    waiting.forEach((socket) => socket.destroy());
    await inside[0].close(1000);
    await inside[0].closed();
    await waitFor(() => server.connect('/ws/x?echo=1').then(
        (peer) => echoes(peer).then(() => true), () => false), 'there is room again');
});

test('Out of descriptors: newcomers get 503, nothing spins, and it recovers', async (t) => {
    const server = await startServer(t);
    const inside = await server.connect('/ws/x?echo=1');
    const used = fs.readdirSync(`/proc/${server.pid}/fd`).map(Number);
    const limit = (soft) => execFileSync('prlimit',
        ['--pid', String(server.pid), `--nofile=${soft}:`]);
    let free = 0;
    while (used.includes(free))
        free++;
    limit(free);
    const waiting = await Promise.all(Array.from({ length: 30 }, () => open(server)));
    let refused = 0;
    for (const socket of waiting)
        socket.setEncoding('latin1').on('data', (text) =>
            (refused += text.startsWith('HTTP/1.1 503 ')));
    const before = cpu(server);
    await setTimeout(2000);
    assert.ok(refused >= 1 && refused <= 40, `${refused} were refused in 2 s`);
    assert.ok(cpu(server) - before <= 200, `${cpu(server) - before} ms of CPU time`);
    await echoes(inside);
    waiting.forEach((socket) => socket.destroy());
    limit(1024);
    await waitFor(() => server.connect('/ws/x?echo=1').then(
        (peer) => echoes(peer).then(() => true), () => false), 'there is room again');
});

test('Without clients nothing wakes the server, with idle ones once a second', async (t) => {
    const server = await startServer(t);
    await setTimeout(300);
    let before = wakeups(server);
    await setTimeout(3000);
    assert.equal(wakeups(server) - before, 0);
    await Promise.all(Array.from({ length: 20 }, (_, i) => server.connect(`/ws/${i % 3}`)));
    await setTimeout(1200);
    before = wakeups(server);
    await setTimeout(3000);
    assert.ok(wakeups(server) - before <= 4, `${wakeups(server) - before} in 3 s`);
});

test('When the last client has left, nothing wakes the server again', async (t) => {
    const server = await startServer(t, { args: ['--request-timeout', '1'] });
    const peer = await server.connect('/ws/x?echo=1');
    await echoes(peer);
    await peer.close(1000);
    await peer.closed();
    await server.get('/healthz');
    await setTimeout(2500);
    const before = wakeups(server);
    await setTimeout(1500);
    assert.equal(wakeups(server) - before, 0);
});

// ----- what can be watched -------------------------------------------------

test('/healthz is JSON that says ok', async (t) => {
    const server = await startServer(t);
    const { status: code, headers, body } = await server.get('/healthz');
    assert.equal(code, 200);
    assert.match(headers['content-type'], /^application\/json\b/);
    assert.match(headers['cache-control'], /no-(store|cache)/);
    assert.equal(JSON.parse(body).status, 'ok');
});

// Parses the text format strictly: every family has one HELP and one TYPE line
// ahead of its samples, which stand together; no series comes twice.
function parseMetrics(text) {
    const types = new Map(), series = new Map();
    let family = null;
    assert.ok(text.endsWith('\n'));
    for (const line of text.slice(0, -1).split('\n')) {
        const comment = line.match(/^# (HELP|TYPE) ([a-z_:][a-z0-9_:]*) (\S.*)$/);
        if (comment) {
            const [, kind, name, rest] = comment;
            if (kind === 'TYPE') {
                assert.ok(!types.has(name), `two types of ${name}`);
                assert.match(rest, /^(counter|gauge|histogram|summary|untyped)$/);
                types.set(name, rest);
            } else {
                assert.ok(!types.has(name), `HELP of ${name} comes late`);
            }
            family = name;
            continue;
        }
        const sample = line.match(/^([a-z_:][a-z0-9_:]*)(\{([a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+\})? (\S+)$/);
        assert.ok(sample, `no sample: ${line}`);
        const [, name, labels = '', , value] = sample;
        const base = types.has(name) ? name : name.replace(/_(bucket|sum|count)$/, '');
        assert.ok(types.has(base), `no type of ${name}`);
        assert.equal(base, family, `${name} stands among ${family}`);
        assert.ok(name.startsWith('collabd_'), name);
        assert.equal(types.get(base) === 'counter', name.endsWith('_total'), name);
        assert.ok(!series.has(name + labels), `${name}${labels} comes twice`);
        assert.match(value, /^[-+]?(\d+(\.\d*)?(e[-+]?\d+)?|Inf|NaN)$/i, name);
        series.set(name + labels, Number(value));
    }
    return { types, series };
}

test('/metrics is the text format of Prometheus', async (t) => {
    const server = await startServer(t, { tls: true });
    await server.connect('/ws/a');
    await server.connectTls('/ws/%22%5c%20%c3%bc');
    const { headers, body } = await server.get('/metrics');
    assert.match(headers['content-type'], /^text\/plain; version=0\.0\.4\b/);
    const { types, series } = parseMetrics(body);
    const names = [...series.keys()].map((key) => key.replace(/\{.*/, ''));
    for (const name of ['collabd_clients', 'collabd_rooms', 'collabd_messages_in_total',
        'collabd_messages_out_total', 'collabd_bytes_in_total',
        'collabd_bytes_out_total', 'collabd_closes_total', 'collabd_turn_seconds_max'])
        assert.ok(names.includes(name), name);
    assert.equal(types.get('collabd_clients'), 'gauge');
    for (const subject of [/backlog/, /ring/, /memory/])
        assert.ok(names.some((name) => subject.test(name)), `${subject}`);
});

test('The counters count what happened', async (t) => {
    const server = await startServer(t);
    const before = await server.metrics();
    const peers = await Promise.all([1, 2, 3].map(() => server.connect('/ws/x')));
    for (let i = 0; i < 10; i++)
        await peers[0].binary(Buffer.alloc(100));
    await peers[1].messages(10);
    await peers[2].messages(10);
    const during = await server.metrics();
    const moved = (name, now) => now[name] - before[name];
    assert.equal(moved('collabd_clients', during), 3);
    assert.equal(moved('collabd_rooms', during), 1);
    assert.equal(moved('collabd_messages_in_total', during), 10);
    assert.equal(moved('collabd_messages_out_total', during), 20);
    assert.ok(moved('collabd_bytes_in_total', during) >= 1000);
    assert.ok(moved('collabd_bytes_out_total', during) >= 2000);
    await Promise.all(peers.map((peer) => (peer.close(1000), peer.closed())));
    await server.waitForMetric('collabd_clients', before.collabd_clients);
    const then = await server.metrics();
    assert.equal(moved('collabd_messages_in_total', then), 10);
});

// How a client leaves; `own`: with a reason that no other entry has.
const ENDS = {
    peer: { own: true, run: async (peer) => peer.close(1000) },
    gone: { run: async (peer) => peer.end() },
    reset: { run: async (peer) => peer.reset() },
    protocol: { own: true, run: (peer) => peer.text('x', { mask: false }) },
    utf8: { own: true, run: (peer) => peer.text(Buffer.from([0xff])) },
    tooBig: { own: true, run: (peer) => peer.send(frame(OP.BINARY, 'x', { length: 1 << 20 })) },
    reader: { own: true, run: (peer) => peer.text('x'), token: 'reader' },
    stranger: { own: true, run: async () => {}, token: 'stranger' },
    silent: { own: true, run: async () => {}, opt: { autoPong: false },
        args: ['--ping-interval', '1', '--dead-after', '3'] },
    slow: { own: true, run: async (peer, server) => {
        peer.pause();
        const others = await Promise.all([1, 2, 3].map(() => server.connect('/ws/x')));
        others.forEach((other) => (other.onFrame = () => {}));
        const done = (async () => {
            for (let i = 0; i < 1000; i++)
                await others[0].binary(Buffer.alloc(16000));
        })();
        await Promise.race([done, setTimeout(5000)]);
    } },
};

test('Every way to leave is counted once, each under its reason', { timeout: 60000 * SLOW }, async (t) => {
    const tokens = path.join(temporaryFolder(t), 'tokens');
    const hash = (text) => execFileSync('sha256sum', { input: text, encoding: 'utf8' })
        .slice(0, 64);
    fs.writeFileSync(tokens, `${hash('reader')} read *\n${hash('writer')} write *\n`);
    const reasons = new Map();
    for (const [kind, { own, run: leave, token, opt, args = [] }] of Object.entries(ENDS))
        await t.test(kind, async () => {
            const server = await startServer(t, { args: ['--max-message', '64K',
                '--ring', '64K', ...args, ...(token ? ['--tokens', tokens] : [])] });
            const closes = async () => Object.fromEntries(
                Object.entries(await server.metrics())
                    .filter(([name]) => name.startsWith('collabd_closes_total')));
            const grown = (from, to) => Object.keys(to).flatMap((name) =>
                Array(to[name] - (from[name] ?? 0)).fill(name));
            const [zero, one] = [await closes(), await closes()];
            const own1 = grown(zero, one);      // what asking itself counts

            const headers = token ? { Authorization: `Bearer ${token}` } : {};
            const peer = await server.connect('/ws/x', { headers, ...opt });
            const start = await closes();
            const already = grown(one, start);
            await leave(peer, server);
            let moved = [];
            await waitFor(async () => {
                const now = grown(start, await closes());
                moved = [...already, ...now].filter((name) => !own1.includes(name));
                return moved.length > 0;
            }, `${kind} is counted`, 8000 * SLOW);
            assert.equal(moved.length, 1, moved.join());
            assert.match(moved[0], /^collabd_closes_total\{reason="\w+"\}$/);
            if (own)
                assert.ok(!reasons.has(moved[0]), `${moved} also stands for ${reasons.get(moved[0])}`);
            reasons.set(moved[0], kind);
            if (kind === 'slow')
                assert.equal(moved[0], 'collabd_closes_total{reason="slow"}');
        });
});

// ----- the log -------------------------------------------------------------

test('Everything goes to stderr, one line each, with its level', async (t) => {
    const server = await startServer(t, { args: ['--log-level', 'debug'] });
    await server.get('/%0aerror:%20forged');
    await server.get('/x', { Host: 'evil.example', Origin: 'http://a\x7fb' }).catch(() => {});
    const odd = await server.connect(`/ws/${encodeURIComponent('"\\ü\u2028%')}`);
    await odd.close(1000, 'line\nerror: forged');
    await odd.closed();
    const bad = await server.connect('/ws/x');
    await bad.text('x', { mask: false });
    await bad.closed();
    await server.stop();
    assert.equal(server.stdout, '');
    for (const line of server.log) {
        assert.match(line, /^(error|warning|info|debug): \S/);
        assert.doesNotMatch(line, /^error: forged|[\0-\x08\x0a-\x1f\x7f]/);
    }
});

test('--log-level error says nothing of lives and deaths', async (t) => {
    const server = await startServer(t, { args: ['--log-level', 'error'], ready: false });
    await setTimeout(300 * SLOW);
    await server.stop();
    assert.deepEqual(server.log, []);
});

test('A flood of bad clients is no flood in the log', async (t) => {
    const server = await startServer(t);
    for (let i = 0; i < 300; i++) {
        const peer = await server.connect('/ws/x');
        await peer.text('x', { mask: false });
        await peer.closed();
    }
    await server.stop();
    assert.ok(server.log.length < 150, `${server.log.length} lines`);
});

test('A client that sends only garbage disturbs nobody', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect('/ws/x?echo=1');
    for (let i = 0; i < 50; i++) {
        const socket = net.connect(server.port, '127.0.0.1');
        socket.on('error', () => {});
        await once(socket, 'connect');
        socket.write(Buffer.from(Array.from({ length: 3000 }, () =>
            Math.floor(Math.random() * 256))));
        socket.resume();
        await Promise.race([once(socket, 'close'), setTimeout(50)]);
        socket.destroy();
    }
    await echoes(peer);
});
