// SPDX-License-Identifier: MIT
//
// Goal: what README.md tells people to type works. Every fenced block there has
// a name behind its language, as in ```sh curl, and exactly one test here that
// runs it: word by word, but for ports, folders and the token. What would
// install packages or need root is run below a folder of the test or with
// `make -n`. A block without a test fails, and a test without a block.

import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { existsSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { fileURLToPath, pathToFileURL } from 'node:url';
import vm from 'node:vm';
import WebSocket from 'ws';
import { BINARY, SLOW, startServer, temporaryFolder } from './lib/server.js';
import {
    converged, join, load, say, synced, textOf, typed, until, YClient,
} from './lib/yjs.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const README = readFileSync(path.join(ROOT, 'README.md'), 'utf8');
const PATIENCE = 20000 * SLOW;

// ----- the blocks: 'sh curl' -> its text

const blocks = new Map();
for (const [, name, text] of README.matchAll(/^```(.*)\n([^]*?)^```$/gm)) {
    assert.ok(!blocks.has(name), `README.md has two blocks "${name}"`);
    blocks.set(name, text);
}
const handled = new Set();

function block(name, run) {
    handled.add(name);
    test(`the block "${name}" does what it says`, { timeout: PATIENCE },
        async (t) => {
            assert.ok(blocks.has(name), `README.md has no block "${name}"`);
            await run(t, blocks.get(name));
        });
}

// ----- running

// The commands of a block: comments cut off, continued lines joined.
const commands = (text) => text.replaceAll('\\\n', ' ').split('\n')
    .map((line) => line.replace(/(^|\s)#.*/, '').trim()).filter(Boolean);

// A folder to type in, in which `collabd` is the binary under test.
function desk(t) {
    const dir = temporaryFolder(t);
    symlinkSync(path.resolve(BINARY), path.join(dir, 'collabd'));
    return dir;
}

// Runs one command line; { code, out } with stdout and stderr together.
function type(line, cwd, more = {}) {
    const env = { ...process.env, ...more, PATH: `${cwd}:${process.env.PATH}` };
    // this is no part of a make that may run us
    for (const name of ['MAKEFLAGS', 'MFLAGS', 'MAKELEVEL'])
        delete env[name];
    return new Promise((resolve) => execFile('sh', ['-c', `exec 2>&1\n${line}`],
        { cwd, env, timeout: PATIENCE }, (error, out) =>
            resolve({ code: error ? error.code : 0, out })));
}

async function works(line, cwd, more) {
    const { code, out } = await type(line, cwd, more);
    assert.equal(code, 0, `${line}\n${out}`);
    return out;
}

// A line that starts the server: the same words, on a free port of loopback.
// Files and folders are named from the desk.
function serve(t, line, dir) {
    const words = line.split(/\s+/);
    assert.equal(words.shift(), 'collabd');
    const args = words.map((word, i) => {
        if (/^\d+$/.test(word) && /listen$/.test(words[i - 1]))
            return '127.0.0.1:0';
        return /^--(data|tokens|tls-cert|tls-key|www)$/.test(words[i - 1])
            ? path.join(dir, word) : word;
    });
    return startServer(t, { listen: null, args });
}

const at = (text, port) =>
    text.replaceAll(/(localhost|router):\d+/g, `127.0.0.1:${port}`);

// A script of the README, in a folder where it finds the packages that it
// imports; before Node 22 there is no WebSocket without `ws`.
function script(t, text) {
    const dir = desk(t);
    symlinkSync(path.join(ROOT, 'tests', 'node_modules'),
        path.join(dir, 'node_modules'));
    writeFileSync(path.join(dir, 'websocket.mjs'),
        "import WebSocket from 'ws';\nglobalThis.WebSocket ??= WebSocket;\n");
    writeFileSync(path.join(dir, 'readme.mjs'), text);
    return ['--import', pathToFileURL(path.join(dir, 'websocket.mjs')).href,
        path.join(dir, 'readme.mjs')];
}

// Adds to the text of a document, and waits until the server has it.
async function write(server, name, text) {
    const client = await YClient.enter(server, name);
    await client.send(say.update(typed(text)));
    await client.settled();
    await client.leave();
}

// A console that remembers, and tells of its next line.
function listeningConsole() {
    const lines = [];
    let tell = () => {};
    return {
        lines,
        log: (...words) => {
            lines.push(words.join(' '));
            tell();
        },
        next: () => new Promise((resolve) => (tell = resolve)),
        async until(pattern) {
            while (!lines.some((line) => pattern.test(line)))
                await this.next();
        },
    };
}

// ----- the tests

block('sh try', async (t, text) => {
    assert.deepEqual(commands(text), ['make run']);
    const plan = await works('make -n run', ROOT);
    assert.match(plan, /port\/debian\/deps build/);
    assert.match(plan, /collabd --listen 8080/);
});

block('js browser', async (t, text) => {
    const server = await startServer(t);
    const { status } = await server.get('/');
    assert.equal(status, 200);
    const windows = [1, 2].map(() => {
        const console = listeningConsole();
        // what a page from there has
        const page = { console, location: { host: `127.0.0.1:${server.port}` },
            WebSocket: class extends WebSocket {
                constructor(url) {
                    super(url, { origin: `http://127.0.0.1:${server.port}` });
                    t.after(() => this.terminate());
                }
            } };
        vm.runInNewContext(text, page);
        return console;
    });
    // each sees its own message; whoever came first sees two
    await Promise.all(windows.map((one) => one.until(/^hello at \d/)));
    await server.waitForMetric('collabd_messages_in_total', 2);
    while (!windows.some((one) => one.lines.length === 2))
        await Promise.race(windows.map((one) => one.next()));
});

block('sh documents', async (t, text) => {
    const dir = desk(t);
    const [start, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    const server = await serve(t, start, dir);
    assert.match((await server.get('/healthz')).body, /"kept":"in --data"/);
    await write(server, 'notes', 'hello');
    await server.kill();
    const again = await serve(t, start, dir);
    assert.equal(textOf(await load(again, 'notes')), 'hello');
    await again.stop();

    // and without the folder
    const without = await serve(t, start.replace(' --data data', ''), dir);
    await without.waitForLog(/^info: documents live in memory only/);
    assert.match((await without.get('/healthz')).body, /"kept":"in memory only"/);
});

block('js yjs', async (t, text) => {
    const server = await startServer(t);
    await write(server, 'notes', 'world');
    const child = spawn(process.execPath, script(t, at(text, server.port)),
        { stdio: ['ignore', 'pipe', 'inherit'] });
    t.after(() => child.kill('SIGKILL'));
    let out = '';
    child.stdout.on('data', (chunk) => (out += chunk));
    await until(() => out === 'world\n', PATIENCE, () => out);
    const other = join(t, server, 'notes');
    await synced(other);
    other.text.insert(0, 'hello ');
    await until(() => out.endsWith('hello world\n'), PATIENCE, () => out);
});

block('sh stock', async (t, text) => {
    const [start, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    const server = await serve(t, start, desk(t));
    const base = `ws://127.0.0.1:${server.port}`;
    const [a, b] = [1, 2].map(() => join(t, server, 'my-roomname', { base }));
    await Promise.all([synced(a), synced(b)]);
    a.text.insert(0, 'hello');
    await until(() => b.text.toString() === 'hello');
    // the same one as under /yjs
    await converged([a, await load(server, 'my-roomname')]);
});

block('sh backup', async (t, text) => {
    const dir = desk(t);
    const [copy, list, fsck, dump, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    const server = await startServer(t, { args: ['--data', path.join(dir, 'data')] });
    await write(server, 'notes', 'hello');
    await works(copy, dir);
    assert.match(await works(list, dir), /^notes\t\d+\t\d+$/m);
    assert.match(await works(fsck, dir), /^notes\.ydoc: \d+ records, \d+ bytes$/m);
    await works(dump, dir);

    // the update holds the text, in the next block; the copy serves it, too
    const data = path.join(dir, 'backup');
    const copied = await startServer(t, { args: ['--data', data] });
    assert.equal(textOf(await load(copied, 'notes')), 'hello');
    await copied.stop();
    const file = path.join(data, 'notes.ydoc'), bytes = readFileSync(file);
    bytes[bytes.indexOf('hello')] ^= 1;
    writeFileSync(file, bytes);
    assert.equal((await type(fsck, dir)).code, 1);
    const damaged = await startServer(t, { args: ['--data', data] });
    await load(damaged, 'notes');
    await damaged.stop();
    assert.ok(existsSync(`${file}.damaged-1`));
    assert.ok(README.includes('`NAME.ydoc.damaged-1`'));
});

block('sh restore', async (t, text) => {
    const dir = desk(t);
    const [restore, start, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    const server = await startServer(t, { args: ['--data', path.join(dir, 'data')] });
    await write(server, 'notes', 'hello');
    const dump = commands(blocks.get('sh backup')).at(-1);
    await works(dump, dir);
    await works(restore, dir);
    const restored = await serve(t, start, dir);
    assert.equal(textOf(await load(restored, 'notes')), 'hello');

    // beside the server it is refused; and it is merged with what is there
    const refused = await type(restore, dir);
    assert.equal(refused.code, 1, refused.out);
    assert.match(refused.out, /another collabd uses it/);
    await write(restored, 'notes', 'more');
    await restored.stop();
    await works(restore, dir);
    const again = await serve(t, start, dir);
    assert.match(textOf(await load(again, 'notes')), /^(hellomore|morehello)$/);
    await again.stop();

    // the sentence behind it
    assert.ok(README.includes('`--delete`'));
    await works('collabd --delete restored notes', dir);
    assert.doesNotMatch(await works('collabd --list restored', dir), /notes/);
});

block('js node', async (t, text) => {
    const server = await startServer(t);
    const earlier = await server.connect('/ws/hello');
    await earlier.text('from before');
    await server.waitForMetric('collabd_messages_in_total', 1);

    const [, , file] = script(t, at(text, server.port));
    const running = type(`exec node ${file}`, path.dirname(file));

    assert.equal((await earlier.message()).text, '{"x":1,"y":2}');
    server.signal('SIGTERM');
    const { code, out } = await running;
    assert.equal(code, 0, out);
    assert.deepEqual(out.trim().split('\n'),
        ['from before', '1001 server is shutting down']);
});

block('dart not-run', (t, text) => {
    assert.match(README, /Dart[^\n]*not run by the tests/);
    assert.match(text, /ws:\/\/localhost:8080\/ws\/hello/);
});

block('sh curl', async (t, text) => {
    const server = await startServer(t);
    const [health, metrics, upgrade, ...rest] = commands(at(text, server.port));
    assert.equal(rest.length, 0);
    assert.match(await works(`${health} -sS`, ROOT), /"status":"ok"/);
    assert.match(await works(`${metrics} -sS`, ROOT), /^collabd_clients \d+$/m);
    const opened = await type(upgrade, ROOT);
    assert.equal(opened.code, 28, opened.out);  // it was open until the end
    assert.match(opened.out, /^HTTP\/1\.1 101 Switching Protocols/m);
    assert.match(opened.out, /s3pPLMBiTxaQ9kYGzzhZRbK\+xOo=/);
});

block('sh install', async (t, text) => {
    const [install, cross, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    const dir = desk(t);

    // everything is built already, and is to stay as it is
    const make = install.replace(/^sudo /, '');
    assert.notEqual(make, install);
    await works(`${make} DESTDIR=${dir} -o all`, ROOT);
    for (const file of ['usr/sbin/collabd', 'usr/share/man/man8/collabd.8'])
        assert.ok(existsSync(path.join(dir, file)), file);
    assert.match(await works(`${path.join(dir, 'usr/sbin/collabd')} --version`,
        dir), /^collabd \d/);

    assert.match(await works(`${cross} -n BUILD=${dir}/cross`, ROOT),
        /^mips-openwrt-linux-gcc .*collabd\.c/m);
    assert.match(await works('make help', ROOT), /variables: .*CROSS_COMPILE/);
});

// Rows of numbers, the units left out: [[32, 16, 1, 9, 2], …].
const rows = [...README.matchAll(/^\| \d+ \| \d+ \|.* MiB \|$/gm)]
    .map(([row]) => row.match(/\d+/g).map(Number));

block('sh sizes', async (t, text) => {
    const dir = desk(t);
    const [common, ...lines] = commands(text);
    const MIB = 2 ** 20;
    const shown = await Promise.all(lines.map(async (line) => {
        const out = await works(`${common}\n${line}`, dir);
        const setting = (name) => Number(line.match(`--${name} (\\d+)`)[1]);
        const [clients, rooms, docs] = ['max-clients', 'max-rooms', 'doc-memory']
            .map(setting);
        const sum = Number(out.match(/^sum +(\d+)$/m)[1]);
        const [, socket] = out.match(/at most 2 x (\d+) bytes each way/);
        return [clients, rooms, docs / 4, Math.ceil(sum / MIB),
            4 * socket * clients / MIB];
    }));
    assert.deepEqual(rows, shown);
    assert.ok(!existsSync(path.join(dir, 'data')), 'it only shows');
});

block('sh certificates', async (t, text) => {
    const dir = desk(t);
    const [make, start, ask, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    await works(make, dir);
    for (const named of text.matchAll(/tls\/\S+/g))
        assert.ok(existsSync(path.join(dir, named[0])), named[0]);
    assert.ok(existsSync(path.join(dir, 'tls/ca-key.pem')));
    const server = await serve(t, start, dir);
    const answer = await works(
        `${at(ask, server.tlsPort).replace('127.0.0.1', 'localhost')} -sS -4`, dir);
    assert.match(answer, /"status":"ok"/);
});

block('sh tokens', async (t, text) => {
    const dir = desk(t);
    const [make, start, ask, ...rest] = commands(text);
    assert.equal(rest.length, 0);
    const made = await works(make, dir);
    const token = made.match(/token: (\S+)$/m)[1];
    const line = readFileSync(path.join(dir, 'tokens'), 'utf8').trim();
    const server = await serve(t, start, dir);
    await works(`${at(ask, server.port)} -sSf`, dir, { TOKEN: token });

    // the three ways to send it, the patterns and the rights that are named
    const closes = async (where, headers) => {
        const peer = await server.connect(where, { headers });
        peer.close(1000);
        return (await peer.closed()).code;
    };
    assert.equal(await closes('/ws/team/a',
        { Authorization: `Bearer ${token}` }), 1000);
    assert.equal(await closes(`/ws/team/a?token=${token}`), 1000);
    assert.equal(await closes('/ws/team/a',
        { Cookie: `collabd_token=${token}` }), 1000);
    assert.equal(await closes('/ws/team/a'), 4401);
    const hash = line.split(' ')[0];
    for (const right of ['read', 'write', 'admin']) {
        assert.ok(README.includes(`\`${right}\``));
        assert.ok(README.includes('`ws/team/*`'));
        assert.ok(README.includes('`doc/team/*`'));
        writeFileSync(path.join(dir, 'tokens'),
            `${hash} ${right} ws/team/*\n${hash} ${right} doc/team/*\n`);
        const before = (await server.metrics()).collabd_reloads_total;
        server.signal('SIGHUP');
        await server.waitForMetric('collabd_reloads_total', before + 1);
        assert.equal(await closes(`/ws/team/a?token=${token}`), 1000);
        assert.equal(await closes(`/ws/other?token=${token}`), 4403);
        assert.equal(await closes(`/yjs/other?token=${token}`), 4403);
        assert.ok(README.includes('`{ params: { token } }`'));
        const editor = join(t, server, 'team/a', { params: { token } });
        await synced(editor);
        editor.text.insert(0, right);
        if (right === 'read') { // refused, and it stays
            await server.waitForMetric('collabd_doc_refused_total', 1);
            assert.equal(editor.wsconnected, true);
            editor.leave();
        }
    }
    assert.doesNotMatch(textOf(await load(server, `team/a?token=${token}`)), /read/);
});

test('README.md has no block without a test, and no test lacks its block', () => {
    assert.deepEqual([...blocks.keys()].sort(), [...handled].sort());
    const fences = README.match(/^ *(```|~~~)/gm) ?? [];
    assert.equal(fences.length, 2 * blocks.size, 'a fence of another form');
    assert.doesNotMatch(README, /^( {4}|\t)\S.*\n\n/m, 'an indented block');
});

test('the table of chapters is that of collabd.c', () => {
    const source = readFileSync(path.join(ROOT, 'collabd.c'), 'utf8');
    const front = source.slice(0, source.indexOf('*/'));
    const book = [...front.matchAll(/^ \* +(\d+)  (\S.*?)  +\S.*?  +(\S.*)$/gm)]
        .map(([, ...row]) => row);
    const table = [...README.matchAll(/^\| (\d+) \| ([A-Z].*?) \| (.*?) \|$/gm)]
        .map(([, ...row]) => row);
    assert.deepEqual(table, book.filter(([, name]) => /^[A-Z]/.test(name)));
    assert.ok(table.length > 20);
});

test('commands within sentences work, and flags and files there exist', async (t) => {
    const dir = desk(t);
    const prose = README.replaceAll(/^```[^]*?^```$/gm, '');
    const help = await works('collabd --help', dir);
    for (const [, span] of prose.matchAll(/`([^`\n]+)`/g)) {
        const flag = span.match(/^(?:collabd )?--([a-z-]+)/)?.[1];
        if (flag && flag !== 'name')
            assert.match(help, new RegExp(`^  --${flag}\\b`, 'm'), span);
        if (span.startsWith('collabd --'))
            await works(span, dir);
        if (span.startsWith('make '))
            await works(`make -n ${span.slice(5)}`, ROOT);
    }
    for (const [, target] of prose.matchAll(/\]\(((?!http)[^)]+)\)/g))
        assert.ok(existsSync(path.join(ROOT, target)), target);
    assert.match(await works('collabd --show-memory', dir), /^sum +\d+$/m);
});
