// SPDX-License-Identifier: MIT
// Goal: unmodified Yjs editors (WebsocketProvider) work through the server: they
// converge, are caught up, bring home what they wrote offline, outlive restarts,
// stay connected when nothing happens, and get a document that is too long for
// their line without being dropped.

import assert from 'node:assert/strict';
import net from 'node:net';
import { test } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import * as Y from 'yjs';
import { SLOW } from './lib/server.js';
import {
    converged, dataFolder, freePort, join, newDoc, ours, REFERENCE, say, startYjs, synced,
    until, updatesOf, YClient,
} from './lib/yjs.js';

const count = (n) => Array.from({ length: n }, (_, i) => i);
const M = 2 ** 20;
const shows = (provider, text, ms) => until(() => provider.text.toString() === text,
    ms, () => `"${text}", but "${provider.text}"`);

// ----- together ------------------------------------------------------------

test('two editors converge', async (t) => {
    const server = await startYjs(t);
    const [a, b] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(a), synced(b)]);
    for (const i of count(50)) {
        a.text.insert(0, `a${i} `);
        b.text.insert(b.text.length, `b${i} `);
        if (i % 10 === 0)
            await pause(5);
    }
    await converged([a, b]);
    assert.equal(a.text.length, 2 * (10 * 3 + 40 * 4));
});

test('editors that type at once, before they are synced, converge', async (t) => {
    const server = await startYjs(t);
    const all = count(8).map((i) => {
        const p = join(t, server, 'notes');
        p.text.insert(0, `${i} first `);
        p.on('status', ({ status }) => status === 'connected' &&
            p.text.insert(0, `${i} at once `));
        return p;
    });
    await Promise.all(all.map((p) => synced(p)));
    await converged(all);
    for (const i of count(8))
        assert.match(all[0].text.toString(), new RegExp(`${i} first`));
});

test('a late one gets all, in one piece', async (t) => {
    const server = await startYjs(t);
    const a = join(t, server, 'notes');
    a.text.insert(0, 'before anyone came');
    await synced(a);
    const late = join(t, server, 'notes', { connect: false });
    const seen = [];
    late.doc.on('update', () => seen.push(late.text.toString()));
    late.on('sync', (now) => now && seen.push(`synced: ${late.text}`));
    late.connect();
    await synced(late);
    assert.deepEqual(seen, ['before anyone came', 'synced: before anyone came']);
});

test('an empty document is synced at once', async (t) => {
    const server = await startYjs(t);
    const a = join(t, server, 'notes');
    await synced(a);
    assert.equal(a.connects, 1);
});

test('cursors are seen, come back at once and go with their owner', async (t) => {
    const server = await startYjs(t);
    const [a, b] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(a), synced(b)]);
    a.awareness.setLocalState({ name: 'A' });
    const seen = () => b.awareness.getStates().get(a.doc.clientID)?.name;
    await until(() => seen() === 'A');
    a.ws.terminate();
    await until(() => seen() === undefined);
    if (!REFERENCE)
        await until(() => seen() === 'A', 5000 * SLOW);
    a.leave();
    await until(() => seen() === undefined);
});

// ----- apart ---------------------------------------------------------------

test('what was written offline comes home, on both sides', async (t) => {
    const server = await startYjs(t);
    const [a, b] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(a), synced(b)]);
    a.text.insert(0, 'together ');
    await converged([a, b]);
    a.disconnect();
    a.text.insert(a.text.length, 'A alone ');
    a.text.delete(0, 3);
    b.text.insert(b.text.length, 'B alone ');
    b.text.format(0, 4, { bold: true });
    await pause(50);
    a.connect();
    await converged([a, b]);
    assert.match(a.text.toString(), /^ether /);
    assert.match(a.text.toString(), /A alone/);
    assert.match(a.text.toString(), /B alone/);
});

test('what was written offline comes home though it was typed on meanwhile', async (t) => {
    const server = await startYjs(t);
    const [a, b] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(a), synced(b)]);
    for (const i of count(10)) {
        a.ws.terminate();
        a.text.insert(0, `${i} offline `);
        b.text.insert(0, `${i} online `);
        await until(() => a.wsconnected);
        a.text.insert(0, `${i} again `);
    }
    await converged([a, b]);
    assert.equal(b.text.toString().match(/offline/g).length, 10);
});

test('undo crosses the server', async (t) => {
    const server = await startYjs(t);
    const [a, b] = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all([synced(a), synced(b)]);
    const undo = new Y.UndoManager(a.text, { captureTimeout: 0 });
    a.text.insert(0, 'hello world');
    await shows(b, 'hello world');
    b.text.insert(5, ' dear');
    await shows(a, 'hello dear world');
    a.text.delete(0, 5);
    await shows(b, ' dear world');
    undo.undo();
    await shows(b, 'hello dear world');
    undo.undo();
    await shows(b, ' dear');
    undo.redo();
    await shows(b, 'hello dear world');
    await converged([a, b]);
});

test('two editors with one client id keep the server and each other alive', async (t) => {
    const server = await startYjs(t);
    const [a, b, c] = [newDoc(7), newDoc(7), newDoc(8)].map((doc) =>
        join(t, server, 'notes', { doc }));
    await Promise.all([a, b, c].map((p) => synced(p)));
    for (const i of count(20)) {
        a.text.insert(0, `a${i} `);
        b.text.insert(0, `b${i} `);
        c.text.insert(0, `c${i} `);
        await pause(2);
    }
    // Yjs gives one of them a new id when it notices. All stay connected, and
    // newcomers see one and the same thing.
    await pause(300 * SLOW);
    assert.deepEqual([a, b, c].map((p) => p.wsconnected), [true, true, true]);
    const late = [join(t, server, 'notes'), join(t, server, 'notes')];
    await Promise.all(late.map((p) => synced(p)));
    await converged(late);
    assert.match(late[0].text.toString(), /c19/);
    c.text.insert(0, 'still alive ');
    await until(() => late.every((p) => /still alive/.test(p.text.toString())));
});

// ----- a newcomer keeps quiet ----------------------------------------------

function formatted(doc) {
    const text = doc.getText('text');
    text.insert(0, 'plain bold plain '.repeat(40));
    for (const i of count(40)) {
        text.format(i * 17 + 6, 4, { bold: true, n: i });
        if (i % 3 === 0)
            text.format(i * 17, 8, { em: true });
        if (i % 4 === 0)
            text.format(i * 17 + 7, 2, { bold: null });
    }
    text.insertEmbed(9, { image: 'x' }, { link: { href: 'y' } });
    text.delete(100, 90);
}

function structured(doc) {
    const xml = doc.getXmlFragment('xml');
    for (const i of count(40)) {
        const p = new Y.XmlElement('p');
        p.setAttribute('level', `${i}`);
        p.insert(0, [new Y.XmlText(`paragraph ${i}`), new Y.XmlElement('br')]);
        xml.insert(i % 7 ? xml.length : 0, [p]);
        p.get(0).format(0, 5, { strong: true });
        p.setAttribute('level', `${i + 1}`);
    }
    xml.delete(3, 9);
}

test('a newcomer to formatted text and XML sends no update of its own', async (t) => {
    const server = await startYjs(t);
    for (const [name, make] of Object.entries({ formatted, structured })) {
        const authors = [join(t, server, name), join(t, server, name)];
        await Promise.all(authors.map((p) => synced(p)));
        authors.forEach((p) => make(p.doc));    // at once: they conflict
        await converged(authors);
        make(authors[0].doc);
        await converged(authors);
        for (const gc of [true, false]) {
            const late = join(t, server, name, { gc, connect: false });
            let own = 0;
            late.doc.on('update', (_, origin) => {
                own += origin === late ? 0 : 1;
            });
            late.connect();
            await synced(late);
            await converged([late, authors[0]]);
            assert.equal(own, 0, `${name}, gc ${gc}`);
            late.leave();
        }
    }
});

// The document of a big join, typed by several: [the updates, the text]. The
// first types on and on, which may become one long struct; the others here and
// there, with formats.
function bigDocument(size) {
    const updates = [], main = newDoc();
    for (const i of count(Math.ceil(size / 2 / 20000)))
        updates.push(...updatesOf(main, () => main.getText('long')
            .insert(main.getText('long').length, `${i} `.padEnd(20000, 'long '))));
    for (const _ of count(5)) {
        const doc = newDoc();
        Y.applyUpdate(doc, Y.encodeStateAsUpdate(main));
        const text = doc.getText('text');
        for (const i of count(Math.ceil(size / 10 / 1000)))
            updates.push(...updatesOf(doc, () => {
                const at = (i * 7919) % (text.length + 1);
                text.insert(at, `${i} `.padEnd(1000, 'short '));
                if (i % 9 === 0)
                    text.format(at, 90, { bold: true });
            }));
    }
    return updates;
}

async function fill(server, name, size) {
    const writer = await YClient.enter(server, name);
    for (const [i, update] of bigDocument(size).entries()) {
        await writer.send(say.update(update));
        if (i % 50 === 0)
            await writer.settled(60000 * SLOW);
        writer.drain();
    }
    await writer.settled(60000 * SLOW);
    return writer;
}

const ROOMY = { args: ['--doc-memory', '256M', '--max-doc', '64M'] };

test('a join above 4 MiB is complete at its SyncStep2, and nothing is sent back', async (t) => {
    const server = await startYjs(t, ROOMY);
    await fill(server, 'notes', 9 * M);
    const late = join(t, server, 'notes', { connect: false });
    let own = 0, shown = 0;
    late.doc.on('update', (_, origin) => (own += origin === late ? 0 : 1));
    late.doc.on('afterTransaction', (tr) => (shown += tr.changed.size ? 1 : 0));
    late.connect();
    await synced(late, 60000 * SLOW);
    assert.ok(late.doc.getText('long').length >= 4.4 * M);
    assert.ok(late.text.length >= 4.4 * M);
    assert.equal(late.doc.store.pendingStructs, null);
    assert.equal(own, 0);
    assert.equal(shown, 1, 'the client saw half a document');
    assert.equal(late.connects, 1);
    const other = join(t, server, 'notes');
    await synced(other, 60000 * SLOW);
    other.text.insert(0, 'and on ');
    await converged([late, other]);
});

// ----- restarts ------------------------------------------------------------

for (const how of ['SIGTERM', 'SIGKILL'])
    test(`editors outlive a restart by ${how}`, ours, async (t) => {
        const port = await freePort(), dir = dataFolder(t);
        const start = () => startYjs(t, { listen: `127.0.0.1:${port}`,
            args: ['--data', dir] });
        let server = await start();
        const [a, b] = [join(t, server, 'notes'), join(t, server, 'notes')];
        await Promise.all([synced(a), synced(b)]);
        for (const i of count(3)) {
            a.text.insert(0, `${i} before `);
            await shows(b, a.text.toString());
            await (how === 'SIGTERM' ? server.stop({ keepClients: true }) :
                server.kill());
            await until(() => !a.wsconnected && !b.wsconnected);
            a.text.insert(0, `${i} meanwhile a `);
            b.text.insert(b.text.length, ` ${i} meanwhile b`);
            server = await start();
            await until(() => a.synced && b.synced, 10000 * SLOW);
            await converged([a, b]);
        }
        const late = join(t, server, 'notes');
        await synced(late);
        await converged([a, b, late]);
        a.leave();
        b.leave();
        late.leave();
        await server.stop();
        server = await start();
        const alone = join(t, server, 'notes');
        await synced(alone);
        for (const i of count(3))
            for (const word of ['before', 'meanwhile a', 'meanwhile b'])
                assert.match(alone.text.toString(), new RegExp(`${i} ${word}`));
    });

// ----- what takes its time; side by side -----------------------------------

// A line of so many bytes a second between clients and a server.
async function slowLine(t, server, rate) {
    const pass = async (from, to) => {
        try {
            for await (const chunk of from)
                for (let at = 0; at < chunk.length; at += rate / 50) {
                    const part = chunk.subarray(at, at + rate / 50);
                    if (!to.write(part))
                        await new Promise((resolve) => to.once('drain', resolve)
                            .once('close', resolve));
                    await pause(1000 * part.length / rate);
                }
        } catch { /* it was cut */ }
        to.end();
    };
    const line = net.createServer((client) => {
        const far = net.connect(server.port, '127.0.0.1');
        for (const socket of [client, far])
            socket.on('error', () => {}).on('close', () => {
                client.destroy();
                far.destroy();
            });
        pass(far, client);
        client.pipe(far);
    });
    await new Promise((resolve) => line.listen(0, '127.0.0.1', resolve));
    t.after(() => line.close());
    return { port: line.address().port };
}

test('in long times', {
    concurrency: true,
    skip: process.env.COLLABD_SHORT && 'takes more than a minute',
}, async (t) => {
    await Promise.all([
        t.test('a lone editor stays connected for 75 s', async (t) => {
            const server = await startYjs(t);
            const usual = join(t, server, 'one');
            await synced(usual);
            const all = [usual];
            if (!REFERENCE) {   // without awareness nothing is echoed
                const hidden = join(t, server, 'two');
                hidden.awareness.setLocalState(null);
                await synced(hidden);
                all.push(hidden);
            }
            await pause(75000);
            for (const p of all) {
                assert.equal(p.connects, 1, `${p.roomname} reconnected`);
                assert.ok(p.wsconnected && p.synced);
            }
        }),
        t.test('20 MB reach a client at 400 KB/s while others type', ours, async (t) => {
            const server = await startYjs(t, ROOMY);
            const writer = await fill(server, 'notes', 20 * M);
            await writer.leave();
            const typists = count(2).map(() => join(t, server, 'notes'));
            await Promise.all(typists.map((p) => synced(p, 60000 * SLOW)));
            const line = await slowLine(t, server, 400000);
            const slow = join(t, line, 'notes');
            let typed = 0, worst = 0;
            const from = Date.now();
            while (!slow.synced) {
                assert.ok(Date.now() - from < 120000 * SLOW, 'it never arrived');
                assert.ok(slow.connects <= 1, 'it had to reconnect');
                const at = Date.now();
                typists[typed % 2].doc.getMap('typed').set(`${typed}`, at);
                const other = typists[(typed + 1) % 2].doc.getMap('typed');
                const key = `${typed++}`;
                await until(() => other.has(key), 10000 * SLOW);
                worst = Math.max(worst, Date.now() - at);
                await pause(250);
            }
            t.diagnostic(`${Date.now() - from} ms, ${typed} edits meanwhile, ` +
                `the slowest took ${worst} ms`);
            assert.ok(Date.now() - from > 30000, 'the line was not slow');
            assert.ok(worst < 5000 * SLOW, `an edit took ${worst} ms`);
            await converged([slow, ...typists], 60000 * SLOW);
            assert.equal(slow.connects, 1);
            assert.ok(slow.text.length > 9 * M);
            assert.equal(typists[0].connects + typists[1].connects, 2);
        }),
    ]);
});
