// SPDX-License-Identifier: MIT
// Goal: what another client has seen, or was synced with, is there after whatever
// happens to the server: kill -9 at any moment, a torn or damaged journal, a file
// that cannot be read. A disk that is full or fails refuses edits without losing
// them: when there is space again, every stock client's text arrives by itself.
// And the tools for a data folder: --fsck, --list, --export, --import.

import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import crypto from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import * as Y from 'yjs';
import { BINARY, SLOW, startServer } from './lib/server.js';
import {
    afterServers, converged, dataFolder, Dice, dump, EMPTY, flat, join, load,
    METRIC, newDoc, ours, say, startYjs, synced, textOf, typed, until,
    updatesOf, YClient,
} from './lib/yjs.js';

const ROOT = process.getuid() === 0;
const needsRoot = { skip: ours.skip || (!ROOT && 'needs root') };
const count = (n) => Array.from({ length: n }, (_, i) => i);
const noise = (size) => crypto.randomBytes(size / 2).toString('hex');

const start = (t, dir, ...args) => startYjs(t, { args: ['--data', dir, ...args] });

// The program as a tool: { status, stdout (bytes), stderr }.
function run(words, input) {
    const done = spawnSync(BINARY, words, { input, timeout: 20000 * SLOW,
        env: { ...process.env, LC_ALL: 'C' } });
    assert.equal(done.error, undefined, `${words}`);
    assert.equal(done.signal, null, `${words}: ${done.stderr}`);
    return { status: done.status, stdout: done.stdout, stderr: `${done.stderr}` };
}
const good = (words, input) => {
    const done = run(words, input);
    assert.equal(done.status, 0, `${words.join(' ')}: ${done.stderr}`);
    return done.stdout;
};
function refused(words, input, ...says) {
    const { status, stderr } = run(words, input);
    assert.notEqual(status, 0, `${words.join(' ')} went well`);
    says.forEach((regex) => assert.match(stderr, regex));
}

// Files below a folder, with what they hold.
function filesOf(dir) {
    return fs.readdirSync(dir, { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile())
        .map((entry) => path.join(entry.path, entry.name));
}
const journalOf = (dir, name) => {
    const found = filesOf(dir).filter((file) => path.basename(file).includes(name));
    assert.equal(found.length, 1, `${filesOf(dir)}`);
    return found[0];
};

// Appends so many words to the root "text", as one client; gives the document.
// They go out so many at a time, and each time makes a record.
async function write(server, name, words, atOnce = words) {
    const client = await YClient.enter(server, name);
    const doc = newDoc(), text = doc.getText('text');
    for (let i = 0; i < words;) {
        const edits = updatesOf(doc, () => {
            for (const end = Math.min(words, i + atOnce); i < end; i++)
                text.insert(text.length, `${name}-${i} `);
        });
        await client.send(...edits.map(say.update));
        await client.settled();
    }
    return { doc, client };
}

// ----- the folder ----------------------------------------------------------

test('the folder is made, for its owner alone', ours, async (t) => {
    const dir = path.join(dataFolder(t), 'data');
    const umask = process.umask(0);
    t.after(() => process.umask(umask));
    const server = await start(t, dir);
    assert.equal(fs.statSync(dir).mode & 0o777, 0o700);
    await write(server, 'notes', 3);
    await server.stop();
    for (const file of filesOf(dir))
        assert.equal(fs.statSync(file).mode & 0o077, 0, file);
});

test('a folder that cannot be is a reason not to start', ours, (t) => {
    const dir = dataFolder(t);
    fs.writeFileSync(path.join(dir, 'file'), 'precious');
    for (const bad of ['file', 'file/below', 'no/such/parent'])
        refused(['--listen', '127.0.0.1:0', '--data', path.join(dir, bad)], '',
            new RegExp(bad.split('/')[0]));
    assert.equal(fs.readFileSync(path.join(dir, 'file'), 'utf8'), 'precious');
});

test('two servers do not share a folder', ours, async (t) => {
    const dir = dataFolder(t);
    const server = await start(t, dir);
    refused(['--listen', '127.0.0.1:0', '--data', dir], '', /use|lock|another/i);
    await write(server, 'notes', 3);
    assert.match(textOf(await load(server, 'notes')), /notes-2/);
});

test('--gc full takes deleted text off the disk, --gc off keeps it', ours, async (t) => {
    for (const [gc, kept] of [['full', false], ['auto', null], ['off', true]]) {
        const dir = dataFolder(t);
        const server = await start(t, dir, '--gc', gc);
        const client = await YClient.enter(server, 'notes');
        const doc = newDoc(undefined, { gc: false }), text = doc.getText('text');
        const edits = updatesOf(doc, () => {
            text.insert(0, 'public secret public');
            text.delete(6, 7);
            count(400).forEach((i) => text.insert(13 + i, 'x'));    // worth a compaction
        });
        await client.send(...edits.map(say.update));
        await client.settled();
        await server.stop();
        const onDisk = fs.readFileSync(journalOf(dir, 'notes')).includes('secret');
        if (kept !== null)
            assert.equal(onDisk, kept, gc);
        const again = await start(t, dir, '--gc', gc);
        assert.equal(textOf(await load(again, 'notes')), `public public${'x'.repeat(400)}`);
        await again.stop();
    }
});

const NAMES = ['notes', 'Notes', 'NOTES', 'a/b', 'a%2Fb/c', 'räum 1', '.hidden',
    '..x', 'con', 'nul.txt', 'a.b~c', '-rf', '😀', 'x'.repeat(128), 'ä'.repeat(64),
    'q"\\*?<>|:', 'tmp', 'lock', 'a.tmp'];

test('every name has a file of its own, case-safe and in the folder', ours, async (t) => {
    const parent = dataFolder(t), dir = path.join(parent, 'data');
    let server = await start(t, dir);
    for (const name of NAMES) {
        const client = await YClient.enter(server, encodeURIComponent(name));
        await client.send(say.update(typed(`this is ${name}`)));
        await client.settled();
        await client.leave();
    }
    await server.stop();
    assert.deepEqual(fs.readdirSync(parent), ['data']);
    const files = filesOf(dir).map((f) => path.relative(dir, f).toLowerCase());
    assert.equal(new Set(files).size, files.length, 'not case-safe');
    assert.ok(files.length >= NAMES.length, `${files}`);
    files.forEach((f) => assert.ok(path.basename(f).length <= 255, f));
    files.forEach((f) => assert.doesNotMatch(f, /[^ -~]|[*?<>|:"\\]/, f));

    server = await start(t, dir);
    for (const name of NAMES)
        assert.equal(textOf(await load(server, encodeURIComponent(name))),
            `this is ${name}`);
});

test('a document is put together when the server ends', ours, async (t) => {
    const dir = dataFolder(t);
    let server = await start(t, dir);
    const { doc, client } = await write(server, 'notes', 3000);
    const grown = fs.statSync(journalOf(dir, 'notes')).size;
    await server.stop();
    const small = fs.statSync(journalOf(dir, 'notes')).size;
    assert.ok(small < grown / 2, `${grown} bytes became ${small}`);
    assert.ok(small < 1.1 * textOf(doc).length + 4096, `${small} bytes`);
    assert.ok(client.gone);
    server = await start(t, dir);
    assert.equal(textOf(await load(server, 'notes')), textOf(doc));
});

// ----- kill -9 -------------------------------------------------------------

// Types into a document and listens to it until the server is killed; gives the
// state that others have seen of it by then.
async function witnessed(server, name, stopped) {
    const [writer, reader] = [await YClient.enter(server, name),
        await YClient.enter(server, name)];
    const doc = newDoc(), seen = new Y.Doc();
    Y.applyUpdate(doc, await writer.ask());
    Y.applyUpdate(seen, await reader.ask());
    const text = doc.getText('text');
    const typing = (async () => {
        while (!stopped.yes && !writer.gone) {
            const edits = updatesOf(doc, () => count(1 + Math.random() * 20)
                .forEach(() => text.insert(Math.floor(Math.random() * text.length),
                    noise(2 + Math.floor(Math.random() ** 8 * 2000) * 2))));
            if (Math.random() < 0.3 && text.length > 50)
                edits.push(...updatesOf(doc, () => text.delete(1, 20)));
            await writer.send(...edits.map(say.update));
            writer.drain();
            await pause(Math.random() * 5);
        }
    })().catch(() => {});
    const hearing = (async () => {
        for (;;) {
            const { update } = await reader.next(60000 * SLOW);
            if (update)
                Y.applyUpdate(seen, update);
        }
    })().catch(() => {});
    const joining = (async () => {      // newcomers are synced meanwhile
        while (!stopped.yes)
            Y.applyUpdate(seen, Y.encodeStateAsUpdate(await load(server, name)));
    })().catch(() => {});
    return async () => {
        await Promise.all([typing, hearing, joining]);
        return seen;
    };
}

for (const fsync of ['interval', 'always'])
    test(`kill -9 loses nothing that others have seen (--fsync ${fsync})`, ours, async (t) => {
        const dir = dataFolder(t), names = ['one', 'two', 'three'];
        const lost = [];
        let total = 0;
        for (const round of count(10)) {
            const server = await start(t, dir, '--fsync', fsync, '--doc-memory', '128M');
            const stopped = { yes: false };
            const ends = await Promise.all(names.map((name) =>
                witnessed(server, name, stopped)));
            await pause(30 + Math.random() * 400 * SLOW);
            await server.kill();
            stopped.yes = true;
            const seen = await Promise.all(ends.map((end) => end()));
            const again = await start(t, dir, '--doc-memory', '128M');
            for (const [i, name] of names.entries()) {
                const kept = await load(again, name);
                const missing = Y.decodeUpdate(Y.encodeStateAsUpdate(seen[i],
                    Y.encodeStateVector(kept))).structs.length;
                Y.applyUpdate(seen[i], Y.encodeStateAsUpdate(kept));
                if (missing || dump(seen[i]) !== dump(kept))
                    lost.push(`round ${round}, ${name}: ${missing} structs`);
                total += textOf(kept).length;
            }
            await (round % 2 ? again.stop() : again.kill());
        }
        assert.deepEqual(lost, []);
        assert.ok(total > 1000, 'nothing was written');
    });

// ----- damage --------------------------------------------------------------

// A folder as kill -9 leaves it, with the text that stands in its two documents.
async function leftBehind(t) {
    const dir = dataFolder(t);
    const server = await start(t, dir);
    const { doc } = await write(server, 'notes', 200, 4);
    const { doc: other } = await write(server, 'other', 50, 5);
    await server.kill();
    return { dir, doc, text: textOf(doc), other: textOf(other) };
}

// The same folder anew, with one file changed.
function copyOf(t, dir, name, change) {
    const to = dataFolder(t);
    fs.cpSync(dir, to, { recursive: true, preserveTimestamps: true });
    const file = journalOf(to, name);
    fs.writeFileSync(file, change(fs.readFileSync(file)));
    return to;
}

test('a torn tail costs what was not whole, and nothing else', ours, async (t) => {
    const { dir, text, other } = await leftBehind(t);
    const size = fs.statSync(journalOf(dir, 'notes')).size;
    for (const _ of count(15)) {
        const at = Math.floor(Math.random() * size);
        const copy = copyOf(t, dir, 'notes', (data) => data.subarray(0, at));
        let server = await start(t, copy);
        const got = textOf(await load(server, 'notes'));
        assert.ok(text.startsWith(got), `cut at ${at} of ${size}: ${got}`);
        assert.equal(textOf(await load(server, 'other')), other);
        // and it is written on
        for (const _ of count(2)) {
            const more = newDoc();
            more.getText('text').insert(0, 'more');
            const client = await YClient.enter(server, 'notes');
            await client.send(say.update(Y.encodeStateAsUpdate(more)));
            Y.applyUpdate(more, await client.ask());
            await client.delivered(more);
            await client.leave();
        }
        await server.kill();
        server = await start(t, copy);
        assert.equal(textOf(await load(server, 'notes')).length, got.length + 8);
        await server.stop();
    }
});

test('garbage behind the end is cut away', ours, async (t) => {
    const { dir, text, other } = await leftBehind(t);
    for (const tail of [Buffer.alloc(1), Buffer.alloc(5000), crypto.randomBytes(700)]) {
        const copy = copyOf(t, dir, 'notes', (data) => Buffer.concat([data, tail]));
        const server = await start(t, copy);
        assert.equal(textOf(await load(server, 'notes')), text);
        assert.equal(textOf(await load(server, 'other')), other);
        await server.stop();
    }
});

test('a flipped byte costs one record, which a returning client fills', ours, async (t) => {
    const { dir, doc, text, other } = await leftBehind(t);
    const size = fs.statSync(journalOf(dir, 'notes')).size;
    for (const _ of count(15)) {
        // not in the last record, where it would look like a torn tail
        const at = Math.floor(Math.random() * (size - 300));
        const copy = copyOf(t, dir, 'notes', (data) => {
            data[at] ^= 1 << Math.floor(Math.random() * 8);
            return data;
        });
        const { status } = run(['--fsck', copy]);
        assert.notEqual(status, 0, `--fsck did not see byte ${at} of ${size}`);
        const server = await start(t, copy);
        const got = textOf(await load(server, 'notes'));
        assert.ok(text.startsWith(got), `byte ${at}: ${got}`);
        await server.waitForLog(/^(warning|error): .*(notes|record)/);
        assert.equal(textOf(await load(server, 'other')), other);

        const back = join(t, server, 'notes', { doc: new Y.Doc() });
        Y.applyUpdate(back.doc, Y.encodeStateAsUpdate(doc));
        await synced(back);
        await until(async () => textOf(await load(server, 'notes')) === text,
            undefined, `byte ${at} of ${size} was not healed`);
        back.leave();
        await server.stop();
    }
});

test('a damaged file is kept aside when it is written anew', ours, async (t) => {
    const { dir } = await leftBehind(t);
    const copy = copyOf(t, dir, 'notes', (data) => {
        data[Math.floor(data.length / 2)] ^= 0x55;
        return data;
    });
    const before = fs.readFileSync(journalOf(copy, 'notes'));
    const server = await start(t, copy);
    await load(server, 'notes');
    await server.stop();
    assert.ok(filesOf(copy).some((f) => fs.readFileSync(f).equals(before)),
        `the damaged file is gone: ${filesOf(copy)}`);
});

// The server stays up, says so, and the document is not for now.
async function cannotOpen(server, name) {
    const client = await YClient.open(server, name);
    await client.send(say.step1(), say.update(typed('lost?')));
    const { code, heard } = await client.closed();
    assert.equal(code, 4513);
    assert.deepEqual(heard, []);
    await server.waitForLog(new RegExp(`^(warning|error): .*${name}`));
}

test('a file that cannot be read closes its document alone', needsRoot, async (t) => {
    const dir = dataFolder(t);
    const own = (file, mode) => {
        fs.chownSync(file, 65534, 65534);
        fs.chmodSync(file, mode);
    };
    own(dir, 0o700);
    let server = await start(t, dir, '--user', 'nobody');
    const { doc } = await write(server, 'notes', 5);
    await write(server, 'other', 5);
    await server.stop();

    const file = journalOf(dir, 'notes'), before = fs.readFileSync(file);
    fs.chownSync(file, 0, 0);
    fs.chmodSync(file, 0o600);
    server = await start(t, dir, '--user', 'nobody');
    await cannotOpen(server, 'notes');
    assert.match(textOf(await load(server, 'other')), /other-4/);
    assert.ok(fs.readFileSync(file).equals(before));
    own(file, 0o600);       // and it needs no restart
    assert.equal(textOf(await load(server, 'notes')), textOf(doc));
});

test('a folder in a file’s place closes its document alone', ours, async (t) => {
    const { dir, other } = await leftBehind(t);
    const file = journalOf(dir, 'notes');
    fs.rmSync(file);
    fs.mkdirSync(file);
    const server = await start(t, dir);
    await cannotOpen(server, 'notes');
    assert.equal(textOf(await load(server, 'other')), other);
    assert.ok(fs.statSync(file).isDirectory());
});

test('a link in a file’s place is not followed', ours, async (t) => {
    const { dir, other } = await leftBehind(t);
    const file = journalOf(dir, 'notes');
    const victim = path.join(dataFolder(t), 'victim');
    fs.writeFileSync(victim, 'precious');
    fs.rmSync(file);
    fs.symlinkSync(victim, file);
    const server = await start(t, dir);
    const client = await YClient.open(server, 'notes');
    await client.send(say.update(typed('x')));
    await client.settled().catch(() => {});
    assert.equal(textOf(await load(server, 'other')), other);
    await server.stop();
    assert.equal(fs.readFileSync(victim, 'utf8'), 'precious');
});

// ----- no space ------------------------------------------------------------

// A file system of its own, of so many KiB.
function smallDisk(t, size) {
    const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'collabd-disk-'));
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${size}k`, 'tmpfs', dir]);
    afterServers(t, () => {
        execFileSync('umount', ['-l', dir]);
        fs.rmdirSync(dir);
    });
    return dir;
}

const health = async (server) => {
    const { status, body } = await server.get('/healthz');
    return { status, body };
};

// While `full`: edits are refused, told once, and nobody is dropped; what only
// deletes is taken; after `free` everybody's text arrives by itself.
async function refusesWithoutLosing(t, server, full, free) {
    const [a, b] = [await YClient.enter(server, 'notes'),
        await YClient.enter(server, 'notes')];
    const [p, q] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(p), synced(q)]);
    const doc = newDoc(), text = doc.getText('text');
    const edit = async (act) => {
        const made = updatesOf(doc, act);
        await a.send(...made.map(say.update));
        return made;
    };
    await edit(() => text.insert(0, 'kept '.repeat(20)));
    await until(() => /kept/.test(q.text.toString()));
    assert.equal((await health(server)).status, 200);

    await full();
    // until it is refused
    for (let i = 0; !(await told(a)); i++) {
        assert.ok(i < 400, 'the disk never was full');
        await edit(() => text.insert(text.length, noise(6000)));
        await a.settled();
    }
    await until(async () => (await health(server)).status === 503);
    assert.match((await health(server)).body, /space|full|large|disk|write/i);
    await b.settled();
    const before = await heardBy(b);

    // told once, and nobody hears of it
    for (const _ of count(5))
        await edit(() => text.insert(text.length, noise(6000)));
    await a.settled();
    await pause(200 * SLOW);
    assert.equal(a.drain().filter((m) => m.kind === 'denied').length, 0, 'told twice');
    p.text.insert(0, `typed by p ${noise(9000)}`);
    await pause(100 * SLOW);
    assert.equal(b.drain().length, 0, 'somebody heard of what was refused');

    // deletions are taken
    const [removal] = await edit(() => text.delete(0, 5));
    const heard = (await b.take('update')).update;
    assert.deepEqual(Buffer.from(heard), removal);
    assert.ok((await server.metrics())[METRIC.refused] > 5);

    await free();
    const seen = new Y.Doc();
    [...before, heard].forEach((u) => Y.applyUpdate(seen, u));
    const { data } = await a.take('step1', 10000 * SLOW);
    await a.send(say.step2(Y.encodeStateAsUpdate(doc, data)));
    await until(() => {
        for (const { update } of b.drain())
            if (update)
                Y.applyUpdate(seen, update);
        return seen.getText('text').toString().includes(text.toString().slice(-6000));
    });
    await until(() => /typed by p/.test(q.text.toString()), 10000 * SLOW);
    await until(async () => (await health(server)).status === 200);
    assert.deepEqual([p.connects, q.connects, a.gone, b.gone], [1, 1, false, false]);
    // and all goes on
    q.text.insert(0, 'and on ');
    await converged([p, q]);
    Y.applyUpdate(doc, Y.encodeStateAsUpdate(p.doc));
    assert.equal(textOf(doc), textOf(p.doc));
    return p.doc;
}

async function told(client) {
    await pause(20);
    return client.drain().some((m) => m.kind === 'denied' && m.reason.length > 3);
}
async function heardBy(client) {
    await pause(50 * SLOW);
    return client.drain().filter((m) => m.update).map((m) => m.update);
}

for (const fsync of ['interval', 'always'])
    test(`a full disk refuses without losing (--fsync ${fsync})`, needsRoot, async (t) => {
        const disk = smallDisk(t, 2048), dir = path.join(disk, 'data');
        const server = await start(t, dir, '--fsync', fsync);
        const ballast = path.join(disk, 'ballast');
        const doc = await refusesWithoutLosing(t, server, () => {
            const { bavail, bsize } = fs.statfsSync(disk);
            fs.writeFileSync(ballast, Buffer.alloc(bavail * bsize - 60000));
        }, () => fs.rmSync(ballast));
        await server.kill();
        const again = await start(t, dir);
        assert.equal(dump(await load(again, 'notes')), dump(doc));
        await again.stop();
    });

test('a limit on the size of files refuses without losing', ours, async (t) => {
    const dir = dataFolder(t);
    const server = await start(t, dir);
    const limit = (size) => execFileSync('prlimit',
        [`--pid=${server.pid}`, `--fsize=${size}:unlimited`]);
    const doc = await refusesWithoutLosing(t, server, () => limit(40000),
        () => limit('unlimited'));
    await server.kill();
    const again = await start(t, dir);
    assert.equal(dump(await load(again, 'notes')), dump(doc));
});

test('a disk that is full already starts, serves and heals', needsRoot, async (t) => {
    const disk = smallDisk(t, 1024), dir = path.join(disk, 'data');
    let server = await start(t, dir);
    const { doc } = await write(server, 'notes', 50);
    await server.stop();
    const ballast = path.join(disk, 'ballast');
    const { bavail, bsize } = fs.statfsSync(disk);
    fs.writeFileSync(ballast, Buffer.alloc(bavail * bsize));
    server = await start(t, dir);
    assert.equal(textOf(await load(server, 'notes')), textOf(doc));
    const p = join(t, server, 'new');
    await synced(p);
    p.text.insert(0, noise(20000));
    await until(async () => (await health(server)).status === 503);
    fs.rmSync(ballast);
    await until(async () => textOf(await load(server, 'new')) === p.text.toString(),
        15000 * SLOW);
    assert.equal(p.connects, 1);
    await until(async () => (await health(server)).status === 200);
    await server.stop();
});

test('a read-only disk is said so, and what is there can be read', needsRoot, async (t) => {
    const disk = smallDisk(t, 1024), dir = path.join(disk, 'data');
    const server = await start(t, dir);
    const { doc } = await write(server, 'notes', 50);
    await server.stop();
    execFileSync('mount', ['-o', 'remount,ro', disk]);
    assert.ok(good(['--export', dir, 'notes']).length > 100);
    good(['--list', dir]);
    good(['--fsck', dir]);
    const again = await startServer(t, { args: ['--data', dir], ready: false });
    await again.waitForLog(/^info: ready/).catch(() => again.gone);
    if (again.exit) {
        assert.ok(again.exit.code > 0, again.describe());
        again.expectedExit = again.exit.code;
        assert.match(again.log.join('\n'), /[Rr]ead-only/);
        return;
    }
    again.learnAddresses();
    assert.equal(textOf(await load(again, 'notes')), textOf(doc));
    const client = await YClient.enter(again, 'notes');
    await client.send(say.update(typed('more')));
    await client.expect('denied');
    await until(async () => (await health(again)).status === 503);
    execFileSync('mount', ['-o', 'remount,rw', disk]);
    await client.take('step1', 10000 * SLOW);
    await again.stop();
});

test('a folder that vanishes does not take the server along', ours, async (t) => {
    const dir = path.join(dataFolder(t), 'data');
    const server = await start(t, dir);
    const { client, doc } = await write(server, 'notes', 50);
    const b = await YClient.enter(server, 'notes');
    fs.rmSync(dir, { recursive: true });
    const [edit] = updatesOf(doc, () => doc.getText('text').insert(0, 'still '));
    await client.send(say.update(edit));
    await client.settled();
    const heard = await heardBy(b);
    assert.ok(heard.length || client.drain().some((m) => m.kind === 'denied'));
    const other = await YClient.open(server, 'other');
    await other.send(say.step1(), say.update(typed('x')));
    await other.settled().catch(() => {});
    await Promise.all([client.leave(), b.leave()]);
    await pause(200 * SLOW);
    assert.ok([200, 503].includes((await health(server)).status));
    server.signal('SIGTERM');
    const { code, signal } = await server.gone;
    assert.equal(signal, null);
    server.expectedExit = code;
});

// ----- how often it is written ---------------------------------------------

async function typing(server, ms) {
    const client = await YClient.enter(server, 'notes');
    const doc = newDoc(), text = doc.getText('text');
    for (const end = Date.now() + ms; Date.now() < end; await pause(20))
        await client.send(...updatesOf(doc, () => text.insert(0, 'a')).map(say.update));
    await client.settled();
    return server.metrics();
}

test('--fsync always syncs before it tells, many edits at a time', ours, async (t) => {
    const server = await start(t, dataFolder(t), '--fsync', 'always');
    const b = await YClient.enter(server, 'notes');
    await write(server, 'notes', 1);
    await b.take('update');
    const one = (await server.metrics())[METRIC.syncs];
    assert.ok(one >= 1, 'an edit was told before it was synced');
    await write(server, 'notes', 2000);
    const doc = new Y.Doc();
    while (!textOf(doc).endsWith('notes-1999 '))
        Y.applyUpdate(doc, (await b.take('update')).update);
    const seen = await server.metrics();
    assert.ok(seen[METRIC.syncs] - one < 1000, `${seen[METRIC.syncs]} syncs`);
});

test('--fsync interval syncs about once a second', ours, async (t) => {
    const server = await start(t, dataFolder(t));
    const seen = await typing(server, 4000);
    assert.ok(seen[METRIC.syncs] >= 2 && seen[METRIC.syncs] <= 8,
        `${seen[METRIC.syncs]} syncs in 4 s`);
    assert.ok(seen[METRIC.commits] >= seen[METRIC.syncs] - 2);
    assert.ok(seen[METRIC.bytes] > 200 * 15);
});

test('--write-budget stretches the interval when it is used up', ours, async (t) => {
    const server = await start(t, dataFolder(t), '--write-budget', '4K');
    const b = await YClient.enter(server, 'notes');
    const first = await typing(server, 4000);
    const second = await typing(server, 4000);
    assert.ok(second[METRIC.syncs] - first[METRIC.syncs] <= 2,
        `${first[METRIC.syncs]} syncs, then ${second[METRIC.syncs]}`);
    // and nobody waits for it
    const from = Date.now();
    b.drain();
    await write(server, 'notes', 1);
    await b.take('update');
    assert.ok(Date.now() - from < 2000 * SLOW);
});

// ----- tools ---------------------------------------------------------------

// A folder with documents made by dice; gives their dumps by name.
async function library(t) {
    const dir = dataFolder(t), docs = {};
    const server = await start(t, dir);
    for (const [i, name] of ['notes', 'a/b', 'räum 1', 'Notes'].entries()) {
        const d = new Dice(i + 1), doc = newDoc();
        const client = await YClient.enter(server, encodeURIComponent(name));
        const edits = updatesOf(doc, () => count(200).forEach(() => d.edit(doc)));
        await client.send(...edits.map(say.update));
        await client.settled();
        docs[name] = dump(doc);
    }
    return { dir, docs, server };
}

function exported(dir, name) {
    const doc = new Y.Doc();
    Y.applyUpdate(doc, new Uint8Array(good(['--export', dir, name])));
    return dump(doc);
}

for (const state of ['stopped', 'killed', 'running'])
    test(`--list, --fsck, --export read a ${state} server’s folder`, ours, async (t) => {
        const { dir, docs, server } = await library(t);
        if (state !== 'running')
            await (state === 'killed' ? server.kill() : server.stop());
        const before = filesOf(dir).map((f) => [f, fs.readFileSync(f, 'hex')]);
        const list = good(['--list', dir]).toString().trimEnd().split('\n');
        for (const name of Object.keys(docs)) {
            assert.ok(list.some((line) => line.includes(name)), `${name}: ${list}`);
            assert.equal(exported(dir, name), docs[name]);
        }
        assert.equal(list.filter((line) => /notes|a\/b|räum|Notes/.test(line)).length, 4);
        good(['--fsck', dir]);
        refused(['--export', dir, 'nothing'], '', /nothing/);
        refused(['--export', dir, '../x'], '', /name|\.\./);
        assert.deepEqual(filesOf(dir).map((f) => [f, fs.readFileSync(f, 'hex')]), before,
            'something was written');
    });

test('--import brings in what --export gave', ours, async (t) => {
    const { dir, docs, server } = await library(t);
    await server.stop();
    const to = path.join(dataFolder(t), 'new');
    for (const name of Object.keys(docs))
        good(['--import', to, name], good(['--export', dir, name]));
    for (const name of Object.keys(docs))
        assert.equal(exported(to, name), docs[name]);
    good(['--fsck', to]);
    // once more changes nothing; more is merged
    good(['--import', to, 'notes'], good(['--export', dir, 'notes']));
    assert.equal(exported(to, 'notes'), docs.notes);
    good(['--import', to, 'plain'], typed('one '));
    good(['--import', to, 'plain'], typed('two '));
    const again = await start(t, to);
    for (const name of Object.keys(docs))
        assert.equal(dump(await load(again, encodeURIComponent(name))), docs[name]);
    assert.deepEqual(textOf(await load(again, 'plain')).trim().split(' ').sort(),
        ['one', 'two']);
});

test('--import takes no rubbish', ours, async (t) => {
    const { dir, docs, server } = await library(t);
    await server.stop();
    for (const rubbish of ['', 'hello', flat(1, 1, 1, 0, 4), flat([...EMPTY], 0),
        crypto.randomBytes(1000)])
        refused(['--import', dir, 'notes'], rubbish, /\w/);
    refused(['--import', dir, '../x'], typed('x'), /name|\.\./);
    refused(['--import', dir, ''], typed('x'), /\w/);
    for (const name of Object.keys(docs))
        assert.equal(exported(dir, name), docs[name]);
});

test('--import beside a running server refuses and says why', ours, async (t) => {
    const { dir, docs } = await library(t);
    refused(['--import', dir, 'notes'], typed('x'), /another collabd uses it/);
    assert.equal(exported(dir, 'notes'), docs.notes);
});

test('--fsck finds damage and does not touch it', ours, async (t) => {
    const { dir } = await leftBehind(t);
    good(['--fsck', dir]);
    const copy = copyOf(t, dir, 'notes', (data) => {
        data[Math.floor(data.length / 2)] ^= 4;
        return data;
    });
    const before = fs.readFileSync(journalOf(copy, 'notes'), 'hex');
    const { status, stdout, stderr } = run(['--fsck', copy]);
    assert.notEqual(status, 0);
    assert.match(`${stdout}${stderr}`, /notes/);
    assert.equal(fs.readFileSync(journalOf(copy, 'notes'), 'hex'), before);
    refused(['--fsck', path.join(dir, 'none')], '', /none/);
});

test('a backup is a copy of the folder, even of a running server', ours, async (t) => {
    const { dir, docs } = await library(t);
    const copy = path.join(dataFolder(t), 'copy');
    fs.cpSync(dir, copy, { recursive: true });
    const server = await start(t, copy);
    for (const [name, content] of Object.entries(docs))
        assert.equal(dump(await load(server, encodeURIComponent(name))), content);
});
