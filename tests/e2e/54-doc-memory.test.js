// SPDX-License-Identifier: MIT
// Goal: documents keep to the memory they were given. Above --max-doc and
// --doc-memory edits are refused without being lost and without anybody being
// dropped; idle documents make way and come back from disk; what cannot be opened
// now is told to come again; awareness has its limits; and 20,000 documents that
// were opened, edited and left leave nothing behind.

import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import * as Y from 'yjs';
import { closePayload, frame, OP, upgradeRequest } from './lib/raw.js';
import { SLOW } from './lib/server.js';
import {
    afterServers, converged, dataFolder, join, load, METRIC, newDoc, ours, say,
    startYjs, synced, textOf, typed, until, updatesOf, YClient,
} from './lib/yjs.js';

const K = 1024, M = K * K;
const count = (n) => Array.from({ length: n }, (_, i) => i);
const noise = (size) => crypto.randomBytes(size / 2).toString('hex');
const rss = (server) => K * parseInt(fs.readFileSync(`/proc/${server.pid}/status`,
    'utf8').match(/VmRSS:\s+(\d+)/)[1], 10);

// Types into a document until it is refused; gives what was said then, and the
// document with all that was taken in.
async function overfill(client, most, step = 8 * K) {
    const doc = newDoc(), text = doc.getText('text');
    for (let size = 0; size < most; size += step) {
        const [edit] = updatesOf(doc, () => text.insert(text.length, noise(step)));
        await client.send(say.update(edit));
        await client.settled();
        await pause(5);
        const denied = client.drain().find((m) => m.kind === 'denied');
        if (denied)
            return { doc, reason: denied.reason, taken: size };
    }
    assert.fail(`${most} bytes were taken`);
}

// ----- one document --------------------------------------------------------

test('a document above --max-doc refuses, takes deletions, and heals', ours, async (t) => {
    const server = await startYjs(t, { args: ['--max-doc', '256K',
        '--doc-memory', '8M', '--data', dataFolder(t)] });
    const [a, b] = [await YClient.enter(server, 'notes'),
        await YClient.enter(server, 'notes')];
    const [p, q] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(p), synced(q)]);
    const { doc, reason, taken } = await overfill(a, M);
    assert.match(reason, /large|full|big|limit|memory|max-doc/i);
    assert.ok(taken > 100 * K, `refused at ${taken}`);
    assert.ok((await server.metrics())[METRIC.refused] > 0);

    const text = doc.getText('text'), refused = text.toString().slice(-8 * K);
    p.text.insert(0, `typed by p ${noise(8 * K)}`);
    await pause(200 * SLOW);
    assert.ok(!q.text.toString().includes('typed by p'), 'taken above the limit');
    assert.equal(a.drain().length, 0, 'told twice, or told what was refused');

    // others are not concerned
    const other = await YClient.enter(server, 'other');
    await other.send(say.update(typed('fine')));
    assert.equal(textOf(await load(server, 'other')), 'fine');

    // q, which has all that was taken, deletes most of it
    b.drain();
    q.text.delete(0, q.text.length - 20 * K);
    assert.ok((await b.take('update')).update.length < K);
    const { data } = await a.take('step1', 15000 * SLOW);
    await a.send(say.step2(Y.encodeStateAsUpdate(doc, data)));
    await until(() => q.text.toString().includes(refused), 15000 * SLOW,
        'the refused text never came');
    await until(() => q.text.toString().includes('typed by p'), 15000 * SLOW,
        'the refused text of a stock client never came');
    await converged([p, q]);
    assert.deepEqual([p.connects, q.connects, a.gone], [1, 1, false]);
});

test('a document that was taken in opens again, however it ended', ours, async (t) => {
    for (const [how, edits, size] of [['kill', 200000, 1], ['kill', 5000, 400],
        ['stop', 5000, 400]]) {
        const dir = dataFolder(t);
        const args = ['--doc-memory', '4M', '--data', dir];
        const server = await startYjs(t, { args });
        const client = await YClient.enter(server, 'notes');
        const doc = newDoc(), text = doc.getText('text');
        let denied = null;
        for (let i = 0; i < edits && !denied; i += 500) {
            const made = updatesOf(doc, () => count(500).forEach(() => text.insert(
                Math.floor(text.length * Math.random()), size > 1 ? noise(size) : 'x')));
            await client.send(...made.map(say.update));
            await client.settled(60000 * SLOW);
            denied = client.drain().find((m) => m.kind === 'denied');
        }
        const kept = await client.ask();
        await server[how]();
        const again = await startYjs(t, { args });
        const now = await load(again, 'notes');
        const then = new Y.Doc();
        Y.applyUpdate(then, kept);
        assert.ok(textOf(now) === textOf(then), `${how}: ${textOf(now).length} of ` +
            `${textOf(then).length} (${denied?.reason})`);
        t.diagnostic(`${how}: ${kept.length} bytes, ${denied?.reason}`);
        await again.stop();
    }
});

test('an update longer than --max-doc is refused, not its document', ours, async (t) => {
    const server = await startYjs(t, { args: ['--max-doc', '64K'] });
    const [a, b] = [await YClient.enter(server, 'notes'),
        await YClient.enter(server, 'notes')];
    await a.send(say.update(typed(noise(200 * K))));
    await a.expect('denied');
    await b.send(say.update(typed('small')));
    await a.take('update');
    assert.equal(textOf(await load(server, 'notes')), 'small');
});

test('a document of many small edits fits when it is put together', ours, async (t) => {
    const server = await startYjs(t, { args: ['--max-doc', '256K'] });
    const a = await YClient.enter(server, 'notes');
    const doc = newDoc(), text = doc.getText('text');
    for (const _ of count(30)) {        // 30,000 edits, 700 KB as they came
        const edits = updatesOf(doc, () => count(1000).forEach(() =>
            text.insert(text.length, 'x')));
        await a.send(...edits.map(say.update));
        await a.settled();
    }
    assert.deepEqual(a.drain(), []);
    assert.equal(textOf(await load(server, 'notes')).length, 30000);
    assert.ok((await server.metrics())[METRIC.merges] > 0);
});

// ----- all documents -------------------------------------------------------

// Enters as often as it takes: while the idle ones are being put away, there may
// be no place for a moment.
const patient = (server, name) => until(() => YClient.enter(server, name)
    .catch((error) => assert.match(error.message, /503|4513/)), 15000 * SLOW, name);

// A document of so many bytes, written by a client that answers when it is asked
// again, and left. Gives its text.
async function deposit(server, name, size) {
    const client = await patient(server, name);
    const doc = newDoc(), text = doc.getText('text');
    for (let done = 0; done < size; done += 50 * K)
        await client.send(...updatesOf(doc, () => text.insert(text.length,
            noise(Math.min(50 * K, size - done)))).map(say.update));
    await client.delivered(doc);
    await client.leave();
    return text.toString();
}

// A document's text as a newcomer gets it, however often it has to come.
async function withdraw(server, name) {
    const client = await patient(server, name);
    const doc = new Y.Doc();
    Y.applyUpdate(doc, client.update);
    await client.leave();
    return textOf(doc);
}

test('idle documents make way for others and come back', ours, async (t) => {
    const server = await startYjs(t, { args: ['--doc-memory', '4M', '--max-doc',
        '1M', '--data', dataFolder(t)] });
    const held = await YClient.enter(server, 'held');
    await held.send(say.update(typed('held all the time')));
    const texts = [];
    for (const i of count(40))
        texts.push(await deposit(server, `doc-${i}`, 200 * K));
    assert.ok(rss(server) < 40 * M * (SLOW > 1 ? 10 : 1), `${rss(server)} bytes`);
    for (const i of [...count(40)].sort(() => Math.random() - 0.5))
        assert.ok(await withdraw(server, `doc-${i}`) === texts[i], `doc-${i}`);
    const doc = new Y.Doc();
    Y.applyUpdate(doc, await held.ask());
    assert.equal(textOf(doc), 'held all the time');
});

test('the longest unused one makes way first', ours, async (t) => {
    const dir = dataFolder(t);
    const server = await startYjs(t, { args: ['--data', dir, '--max-rooms', '4'] });
    for (const name of ['a', 'b', 'c'])
        await deposit(server, name, K);
    await withdraw(server, 'a');
    const hold = await patient(server, 'd');
    await withdraw(server, 'e');
    await withdraw(server, 'f');
    assert.ok((await server.metrics())[METRIC.open] <= 4);
    for (const name of ['a', 'b', 'c'])
        assert.equal((await withdraw(server, name)).length, K);
    assert.ok(!hold.gone);
});

test('without --data nothing that was taken makes way', ours, async (t) => {
    const server = await startYjs(t, { args: ['--doc-memory', '4M', '--max-doc', '1M'] });
    const texts = [];
    let refusal = null;
    for (const i of count(40)) {
        const client = await YClient.open(server, `doc-${i}`);
        await client.send(say.update(typed(texts[i] = noise(200 * K))));
        await client.settled().catch(() => {});
        await pause(10);
        if (client.gone || client.peer.frames.some((f) => f.opcode === OP.CLOSE)) {
            refusal = (await client.closed()).code;
            break;
        }
        if (client.drain().some((m) => m.kind === 'denied')) {
            refusal = 'denied';
            break;
        }
        await client.leave();
    }
    texts.pop();
    assert.ok(['denied', 4513].includes(refusal), `${refusal}`);
    assert.ok(texts.length >= 5, `only ${texts.length} documents fit`);
    for (const [i, text] of texts.entries())
        assert.ok(textOf(await load(server, `doc-${i}`)) === text, `doc-${i}`);
});

test('what cannot be opened now is closed with 4513, and opens later', ours, async (t) => {
    const server = await startYjs(t, { args: ['--doc-memory', '4M', '--max-doc', '1M',
        '--data', dataFolder(t)] });
    const stored = await deposit(server, 'stored', 700 * K);
    const holders = [];
    let last;
    do {        // until all memory is held by documents with members
        const client = await YClient.open(server, `held-${holders.length}`);
        last = await Promise.race([client.closed(60000), (async () => {
            await client.expect('step1');
            return overfill(client, 2 * M, 32 * K);
        })()]).catch((error) => error);
        holders.push(client);
        assert.ok(holders.length < 20, 'there is no end to the memory');
    } while (last.taken > 400 * K);

    const client = await YClient.open(server, 'stored');
    const { code, reason } = await client.closed();
    assert.equal(code, 4513, reason);
    const p = join(t, server, 'stored');
    await pause(300);
    assert.equal(p.synced, false);
    await Promise.all(holders.filter((h) => !h.gone).map((h) => h.leave()));
    await synced(p, 15000 * SLOW);      // a stock client comes again by itself
    assert.ok(p.text.toString() === stored);
});

test('one document too many is told to come again; idle ones make way', ours, async (t) => {
    const server = await startYjs(t, { args: ['--max-rooms', '3', '--data',
        dataFolder(t)] });
    for (const i of count(10))
        await deposit(server, `idle-${i}`, K);
    const held = await Promise.all(count(3).map((i) => patient(server, `held-${i}`)));
    const outcome = await YClient.open(server, 'held-3').then((c) => c.closed())
        .then((end) => end.code, (error) => error.status ?? error);
    assert.ok([4513, 503].includes(outcome), `${outcome}`);
    await YClient.enter(server, 'held-1');
    const waiting = join(t, server, 'held-3');
    await pause(300 * SLOW);
    assert.equal(waiting.synced, false);
    await held[0].leave();
    await synced(waiting, 10000 * SLOW);
    waiting.text.insert(0, 'now');
    await until(async () => textOf(await load(server, 'held-3')) === 'now');
});

test('a storm of joins holds one copy of the document', ours, async (t) => {
    const server = await startYjs(t, { args: ['--doc-memory', '16M', '--max-doc', '4M'] });
    const text = await deposit(server, 'notes', 2 * M);
    const before = rss(server);
    const peers = await Promise.all(count(50).map(() => server.connect('/yjs/notes')));
    peers.forEach((peer) => peer.pause());
    peers.forEach((peer) => peer.binary(say.step1()));
    await pause(500 * SLOW);
    const grown = rss(server) - before;
    assert.ok(SLOW > 1 || grown < 2 * M + 50 * 64 * K + 2 * M,
        `50 joiners took ${grown} bytes`);
    peers.forEach((peer) => peer.resume());
    for (const peer of peers) {
        const doc = await new YClient(peer).load();
        assert.ok(textOf(doc) === text);
    }
});

// ----- awareness -----------------------------------------------------------

test('awareness has its limits, and they concern nobody else', ours, async (t) => {
    const server = await startYjs(t);
    const b = await YClient.enter(server, 'notes');
    const attempt = async (...messages) => {
        const a = await YClient.enter(server, 'notes');
        await a.send(...messages);
        await a.settled().catch(() => {});
        await pause(50 * SLOW);
        return a;
    };
    const fits = await attempt(say.awareness([1, 1, { v: 'x'.repeat(8000) }]));
    assert.equal((await b.take('awareness')).entries[0][2].v.length, 8000);
    await fits.leave();
    await b.take('awareness');

    // [what, message]: nobody hears of it
    for (const [what, message] of [
        ['an entry of 100 KB', say.awareness([1, 1, { v: 'x'.repeat(100000) }])],
        ['1000 entries', say.awareness(...count(1000).map((i) => [i + 1, 1, {}]))],
        ['a state of depth 1000', say.awareness([1, 1,
            `{"a":${'['.repeat(1000)}${']'.repeat(1000)}}`])]]) {
        const a = await attempt(message);
        assert.deepEqual(b.drain(), [], what);
        a.peer.reset();
    }
    await b.silent();
});

test('one connection speaks for a few clients, not for a thousand', ours, async (t) => {
    const server = await startYjs(t);
    const a = await YClient.enter(server, 'notes');
    await a.send(...count(100).map((i) =>
        say.awareness(...count(10).map((j) => [i * 10 + j + 1, 1, { i }]))));
    await a.settled().catch(() => {});
    await pause(50 * SLOW);
    const late = await YClient.enter(server, 'notes');
    await pause(100 * SLOW);
    const known = late.drain().flatMap((m) => m.entries ?? []).length;
    assert.ok(known <= 64, `${known} clients of one connection`);
});

// ----- leaks ---------------------------------------------------------------

// Opens a document, edits it and leaves, all in one packet; resolves when the
// server has closed.
function visit(server, name, update) {
    const mask = [0, 0, 0, 0];
    const packet = Buffer.concat([Buffer.from(upgradeRequest(`/yjs/${name}`)),
        frame(OP.BINARY, say.step1(), { mask }),
        frame(OP.BINARY, say.update(update), { mask }),
        frame(OP.CLOSE, closePayload(1000), { mask })]);
    return new Promise((resolve, reject) => {
        const socket = net.connect(server.port, '127.0.0.1', () => socket.write(packet));
        let got = 0;
        socket.on('data', (chunk) => (got += chunk.length));
        socket.on('end', () => socket.end());
        socket.on('error', reject);
        socket.on('close', () => (got > 120 ? resolve() :
            reject(new Error(`${name}: ${got} bytes`))));
    });
}

test('20,000 documents come and go, and leave nothing behind', ours, async (t) => {
    const total = Number(process.env.COLLABD_LEAK_DOCS ?? (SLOW > 1 ? 2000 : 20000));
    const base = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
    const dir = fs.mkdtempSync(path.join(base, 'collabd-'));
    afterServers(t, () => fs.rmSync(dir, { recursive: true, force: true }));
    const server = await startYjs(t, { args: ['--data', dir, '--max-rooms', '64'] });
    const sizes = [];
    const from = Date.now();
    let next = 0;
    const visitor = async () => {
        while (next < total) {
            const i = next++;
            await visit(server, `leak-${i}`, typed(`document ${i}`));
            if (i % (total / 10) === 0)
                sizes.push(rss(server));
        }
    };
    await Promise.all(count(30).map(visitor));
    sizes.push(rss(server));
    t.diagnostic(`${total} documents in ${Date.now() - from} ms; RSS ` +
        sizes.map((s) => Math.round(s / K)).join(' '));
    const settled = sizes[3];
    assert.ok(SLOW > 1 || sizes.at(-1) < settled + 512 * K,
        `RSS grew from ${settled} to ${sizes.at(-1)}`);
    for (const _ of count(30)) {
        const i = Math.floor(Math.random() * total);
        assert.equal(textOf(await load(server, `leak-${i}`)), `document ${i}`);
    }
    assert.ok((await server.metrics())[METRIC.open] <= 64);
});
