// SPDX-License-Identifier: MIT
// Goal: a channel keeps its promise: every message reaches every other member,
// whole and unchanged, in one order that is the same for all. Also what hangs
// on it: ?echo=1, ?history=N, names, the size limit and --coalesce.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import WebSocket from 'ws';
import { fragments, frame, OP } from './lib/raw.js';
import { SLOW, startServer } from './lib/server.js';

const { CONT, TEXT, BINARY } = OP;
const K = 1024;
const texts = (messages) => messages.map((m) => m.text);
const count = (n, from = 0) => Array.from({ length: n }, (_, i) => i + from);

// Waits until the server has taken in all that `peer` sent so far. What it
// sent is then in the room, and later joiners find it as history only.
async function settled(peer) {
    peer.ping('settled?');
    while ((await peer.next()).text !== 'settled?');
}

async function publish(server, room, messages) {
    const peer = await server.connect(room);
    await peer.send(...messages.map((m) => frame(TEXT, m)));
    await settled(peer);
    return peer;
}

const history = async (server, room, n, expected) => {
    const peer = await server.connect(`${room}?history=${n}`);
    const got = texts(await peer.messages(expected));
    await peer.silent();
    peer.socket.destroy();
    return got;
};

// ----- relaying ------------------------------------------------------------

test('text and binary messages of every size arrive whole and unchanged',
    async (t) => {
        const server = await startServer(t);
        const sender = await server.connect('/ws/sizes');
        const member = await server.connect('/ws/sizes');
        const sizes = [0, 1, 125, 126, 127, 128, 4095, 4096, 4097, 65535, 65536,
            100000, 1024 * K];
        for (const size of sizes) {
            const data = Buffer.alloc(size, '.');
            if (size > 100)
                data.write('Grüße, 世界!');
            for (const opcode of [TEXT, BINARY]) {
                sender.send(frame(opcode, data));
                const got = await member.message();
                assert.equal(got.opcode, opcode);
                assert.ok(got.data.equals(data), `${size} bytes`);
            }
        }
        const bytes = Buffer.from(count(256));
        sender.binary(bytes);
        assert.deepEqual((await member.message()).data, bytes);
    });

test('a message in fragments arrives as one message', async (t) => {
    const server = await startServer(t);
    const sender = await server.connect('/ws/parts');
    const member = await server.connect('/ws/parts');
    for (const pieces of [1, 7, 4096]) {
        const data = Buffer.from('Stück für Stück '.repeat(700));
        sender.send(fragments(TEXT, data, pieces));
        assert.ok((await member.message()).data.equals(data));
    }
});

test('a sender does not get its own messages', async (t) => {
    const server = await startServer(t);
    const a = await server.connect('/ws/room');
    const b = await server.connect('/ws/room');
    a.text('from a');
    assert.equal((await b.message()).text, 'from a');
    b.text('from b');
    assert.equal((await a.message()).text, 'from b');
    await a.silent();
    await b.silent();
});

test('with ?echo=1 a sender gets its own messages at their place in the order',
    async (t) => {
        const server = await startServer(t);
        const a = await server.connect('/ws/room?echo=1');
        const b = await server.connect('/ws/room?echo=1');
        for (const i of count(50)) {
            a.text(`a${i}`);
            b.text(`b${i}`);
        }
        const seen = texts(await a.messages(100));
        assert.deepEqual(seen, texts(await b.messages(100)));
        assert.deepEqual(seen.filter((m) => m[0] === 'a'),
            count(50).map((i) => `a${i}`));
    });

test('concurrent senders: all members see one order, each sender’s own in it',
    async (t) => {
        const each = 400, senders = 6;
        const server = await startServer(t);
        const join = (n, query = '') => Promise.all(count(n).map(() =>
            server.connect(`/ws/order${query}`)));
        const echoing = await join(senders / 2, '?echo=1');
        const plain = await join(senders / 2);
        const observers = await join(3);
        const all = [...echoing, ...plain];

        all.forEach(async (peer, s) => {
            for (const i of count(each)) {
                await peer.text(`${s} ${i} ${'x'.repeat(i % 97)}`);
                if (i % 10 === s)
                    await setTimeout(1);
            }
        });
        const [order, ...others] = await Promise.all(
            [...observers, ...echoing].map(async (peer) =>
                texts(await peer.messages(each * senders, 20000 * SLOW))));
        for (const seen of others)
            assert.deepEqual(seen, order);
        all.forEach((_, s) => assert.deepEqual(
            order.filter((m) => m.startsWith(`${s} `)).map((m) =>
                Number(m.split(' ')[1])), count(each)));
        for (const [i, peer] of plain.entries())
            assert.deepEqual(texts(await peer.messages(each * (senders - 1))),
                order.filter((m) => !m.startsWith(`${senders / 2 + i} `)));
    });

test('channels do not hear each other', async (t) => {
    const server = await startServer(t);
    const a = await server.connect('/ws/one?echo=1');
    const b = await server.connect('/ws/two?echo=1');
    const c = await server.connect('/ws/One?echo=1');   // case counts
    a.text('for one');
    assert.equal((await a.message()).text, 'for one');
    await b.silent();
    await c.silent();
});

test('the ws package, another WebSocket implementation, agrees', async (t) => {
    const server = await startServer(t);
    const sockets = count(3).map(() => new WebSocket(`${server.url}/ws/friends`));
    t.after(() => sockets.forEach((socket) => socket.terminate()));
    await Promise.all(sockets.map((socket) => once(socket, 'open')));
    const heard = sockets.map((socket, i) => {
        const list = [];
        socket.on('message', (data, isBinary) =>
            list.push(isBinary ? [...data] : data.toString()));
        return list;
    });
    assert.equal(sockets[0].extensions, '');    // it offered deflate
    sockets[0].send('text');
    sockets[0].send(Buffer.from([1, 2, 255]));
    sockets[0].send('x'.repeat(200 * K));
    sockets[0].close(4000, 'bye');
    const [code] = await once(sockets[0], 'close');
    assert.equal(code, 4000);
    const until = Date.now() + 5000 * SLOW;
    while (heard[1].length + heard[2].length < 6 && Date.now() < until)
        await setTimeout(5);
    for (const list of heard.slice(1))
        assert.deepEqual(list, ['text', [1, 2, 255], 'x'.repeat(200 * K)]);
    assert.deepEqual(heard[0], []);
});

test('a message followed at once by the sender’s end still reaches the others',
    async (t) => {
        const server = await startServer(t);
        const member = await server.connect('/ws/last-words');
        const leavers = [(peer) => peer.close(1000), (peer) => peer.end()];
        for (const leave of leavers) {
            const peer = await server.connect('/ws/last-words');
            peer.text('last words');
            leave(peer);
            assert.equal((await member.message()).text, 'last words');
            assert.equal((await peer.closed()).how, 'fin');
        }
    });

test('metrics count clients, rooms and messages', async (t) => {
    const server = await startServer(t);
    const none = (await server.metrics()).collabd_clients;  // who asks, perhaps
    const peers = await Promise.all(['a', 'a', 'a', 'b'].map((room) =>
        server.connect(`/ws/${room}`)));
    peers[0].text('hello');
    await Promise.all([peers[1].message(), peers[2].message()]);
    const m = await server.metrics();
    assert.equal(m.collabd_clients, none + 4);
    assert.equal(m.collabd_rooms, 2);
    assert.equal(m.collabd_messages_in_total, 1);
    assert.equal(m.collabd_messages_out_total, 2);
    peers.forEach((peer) => peer.close(1000));
    await server.waitForMetric('collabd_clients', none);
});

// ----- history -------------------------------------------------------------

test('?history=N gives the last N messages first, then what follows',
    async (t) => {
        const server = await startServer(t);
        const sender = await publish(server, '/ws/past',
            count(10).map((i) => `m${i}`));
        const peer = await server.connect('/ws/past?history=3');
        sender.text('live');
        assert.deepEqual(texts(await peer.messages(4)), ['m7', 'm8', 'm9', 'live']);
        assert.equal((await history(server, '/ws/past', 100, 11)).length, 11);
        assert.deepEqual(await history(server, '/ws/past', 1, 1), ['live']);
    });

test('without ?history, or with ?history=0, nothing old is sent', async (t) => {
    const server = await startServer(t);
    await publish(server, '/ws/past', ['old']);
    for (const query of ['', '?history=0', '?echo=1'])
        await (await server.connect(`/ws/past${query}`)).silent();
});

test('history keeps the kind of a message', async (t) => {
    const server = await startServer(t);
    const sender = await server.connect('/ws/kinds');
    sender.text('text');
    sender.binary(Buffer.from([0, 255]));
    await settled(sender);
    const peer = await server.connect('/ws/kinds?history=2');
    const got = await peer.messages(2);
    assert.deepEqual(got.map((m) => [m.opcode, [...m.data]]),
        [[TEXT, [...Buffer.from('text')]], [BINARY, [0, 255]]]);
});

test('a room is kept with its history while it is empty', async (t) => {
    const server = await startServer(t);
    const none = (await server.metrics()).collabd_clients;
    const peer = await publish(server, '/ws/kept', ['one', 'two', 'three']);
    peer.close(1000);
    await server.waitForMetric('collabd_clients', none);
    assert.deepEqual(await history(server, '/ws/kept', 2, 2), ['two', 'three']);
    // and once more: a member that came for history left the room again
    assert.deepEqual(await history(server, '/ws/kept', 9, 3),
        ['one', 'two', 'three']);
});

test('an empty room gives its slot to a new one, a room with members does not',
    async (t) => {
        const server = await startServer(t, { args: ['--max-rooms', '2'] });
        const used = await publish(server, '/ws/used', ['kept']);
        const left = await publish(server, '/ws/left', ['forgotten']);
        await assert.rejects(server.connect('/ws/third'), { status: 503 });
        left.close(1000);
        await left.closed();
        const third = await server.connect('/ws/third');
        assert.deepEqual(await history(server, '/ws/used', 9, 1), ['kept']);
        third.close(1000);
        await third.closed();
        assert.deepEqual(await history(server, '/ws/left', 9, 0), []);
        used.close(1000);
    });

test('history is clamped to a quarter of the ring', async (t) => {
    const server = await startServer(t, { args: ['--ring', '64K'] });
    const size = 1000;
    await publish(server, '/ws/much',
        count(60).map((i) => String(i).padEnd(size, '.')));
    const peer = await server.connect('/ws/much?history=1000');
    const got = [];
    do
        got.push(parseInt((await peer.message()).text));
    while (got.at(-1) !== 59);
    assert.deepEqual(got, count(got.length, 60 - got.length));
    assert.ok(got.length * (size + 4) <= 16 * K, `${got.length} messages`);
    assert.ok((got.length + 2) * (size + 4) > 16 * K, `${got.length} messages`);
    await peer.silent();
});

test('a message above a quarter of the ring is no part of history', async (t) => {
    const server = await startServer(t, { args: ['--ring', '64K'] });
    for (const [room, size] of [['a', 20 * K], ['b', 100 * K]]) {
        await publish(server, `/ws/${room}`, ['before', 'x'.repeat(size), 'after']);
        const peer = await server.connect(`/ws/${room}?history=9`);
        await setTimeout(100 * SLOW);
        const got = texts(peer.frames);
        // Whether what lies before it is still given is left open.
        assert.deepEqual(got, got.length === 1 ? ['after'] : ['before', 'after']);
    }
});

test('between history and what follows nothing is lost and nothing doubled',
    async (t) => {
        const server = await startServer(t);
        const sender = await server.connect('/ws/busy');
        let n = 0, running = true;
        const sending = (async () => {
            for (; running; n++) {
                await sender.text(String(n));
                if (n % 20 === 0)
                    await setTimeout(1);
            }
        })();
        for (const wanted of count(20, 1)) {
            const peer = await server.connect(`/ws/busy?history=${wanted}`);
            const got = texts(await peer.messages(wanted + 100)).map(Number);
            assert.deepEqual(got, count(wanted + 100, got[0]));
            peer.socket.destroy();
        }
        running = false;
        await sending;
    });

// ----- names ---------------------------------------------------------------

test('names are percent-decoded', async (t) => {
    const server = await startServer(t);
    const same = [['abc', '%61%62%63'], ['a%2Fb', 'a/b'], ['caf%C3%A9', 'caf%c3%a9'],
        ['a%20b', '%61%20%62'], ['what%3F', 'what%3f'], ['1+1', '1%2B1'],
        ['a/b/c', 'a/b%2fc'], ['...', '%2E%2E%2E'], ['.hidden', '%2ehidden']];
    for (const [a, b] of same) {
        const one = await server.connect(`/ws/${a}`);
        const two = await server.connect(`/ws/${b}`);
        one.text(a);
        assert.equal((await two.message()).text, a);
        one.socket.destroy();
        two.socket.destroy();
    }
});

test('names that are empty, point elsewhere or hide something are refused',
    async (t) => {
        const server = await startServer(t);
        const bad = ['', '.', '..', '/', 'a//b', '/a', 'a/', 'a/../b', './a', 'a/.',
            '%2e', '%2E%2e', 'a/%2e%2e/b', 'a%2F%2Fb', 'a%2F..%2Fb', 'a%00b',
            'a%0Ab', '%0d', '%1f', '%7F', '%ff', '%C3', '%ed%a0%80', '%c0%ae',
            '%', '%4', '%zz', 'a%2'];
        for (const name of bad) {
            const error = await server.connect(`/ws/${name}`).then(
                () => assert.fail(`"${name}" was accepted`), (e) => e);
            assert.ok([400, 404].includes(error.status), `"${name}": ${error}`);
        }
        assert.equal((await server.metrics()).collabd_rooms, 0);
    });

test('a name may have 128 bytes, and no more', async (t) => {
    const server = await startServer(t);
    const good = ['n'.repeat(128), '%6E'.repeat(128), '%C3%A9'.repeat(64)];
    for (const name of good)
        await server.connect(`/ws/${name}`);
    for (const name of ['n'.repeat(129), '%6e'.repeat(129),
        '%C3%A9'.repeat(64) + 'n', 'n'.repeat(1500)]) {
        const error = await server.connect(`/ws/${name}`).then(
            () => assert.fail('accepted'), (e) => e);
        assert.ok([400, 404, 414].includes(error.status), String(error));
    }
    assert.equal((await server.metrics()).collabd_rooms, 2);
});

// ----- sizes ---------------------------------------------------------------

test('a message larger than the ring keeps its place among small ones',
    async (t) => {
        const server = await startServer(t, { args: ['--ring', '64K'] });
        const peers = await Promise.all([
            server.connect('/ws/big?echo=1'), server.connect('/ws/big'),
            server.connect('/ws/big')]);
        const big = (i) => String(i).padEnd([70, 300, 900][i % 3] * K, '.');
        const list = count(40).map((i) => (i % 7 === 3 ? big(i) : `small ${i}`));
        peers[0].send(...list.map((m) => frame(TEXT, m)));
        for (const peer of peers.filter((p) => p !== peers[0]).concat(peers[0])) {
            const got = texts(await peer.messages(list.length, 20000 * SLOW));
            assert.deepEqual(got.map((m) => m.length), list.map((m) => m.length));
            assert.ok(got.every((m, i) => m === list[i]));
        }
    });

test('large messages of several senders keep one order', async (t) => {
    const server = await startServer(t, { args: ['--ring', '64K'] });
    const peers = await Promise.all(count(4).map(() =>
        server.connect('/ws/many-big?echo=1')));
    peers.forEach((peer, s) => count(10).forEach((i) => peer.text(
        `${s} ${i} `.padEnd((i % 2 ? 1 : 150) * K, '.'))));
    const heads = await Promise.all(peers.map(async (peer) => texts(
        await peer.messages(40, 30000 * SLOW)).map((m) => m.split('.')[0])));
    for (const seen of heads)
        assert.deepEqual(seen, heads[0]);
    peers.forEach((_, s) => assert.deepEqual(
        heads[0].filter((m) => m.startsWith(`${s} `)),
        count(10).map((i) => `${s} ${i} `)));
});

test('a message of --max-message bytes passes, one byte more is Close 1009',
    async (t) => {
        const server = await startServer(t, { args: ['--max-message', '64K'] });
        const member = await server.connect('/ws/limit');
        const exact = Buffer.alloc(64 * K, 'x');
        const over = Buffer.alloc(64 * K + 1, 'x');
        const good = await server.connect('/ws/limit');
        good.send(frame(TEXT, exact), fragments(BINARY, exact, 1000));
        assert.equal((await member.message()).data.length, 64 * K);
        assert.equal((await member.message()).opcode, BINARY);

        const tooBig = [
            frame(TEXT, over),
            Buffer.concat(fragments(TEXT, over, 1000)),
            // only announced, never sent: refused as soon as that is known
            frame(BINARY, 'begin', { length: 2 ** 40 }),
            frame(BINARY, 'begin', { length: 64 * K + 1 }),
            Buffer.concat([frame(TEXT, exact, { fin: false }),
                frame(CONT, 'b', { length: 2 })]),
        ];
        for (const data of tooBig) {
            const peer = await server.connect('/ws/limit');
            peer.send(data);
            assert.equal((await peer.closed()).code, 1009);
        }
        await member.silent();
        good.text('still here');
        assert.equal((await member.message()).text, 'still here');
    });

// ----- coalescing ----------------------------------------------------------

test('--coalesce: the first message goes at once, the next are gathered in order',
    async (t) => {
        const window = 400;
        const server = await startServer(t, { args: ['--coalesce', String(window)] });
        const sender = await server.connect('/ws/gathered');
        const member = await server.connect('/ws/gathered');
        const arrived = [];
        member.onFrame = (f) => arrived.push([f.text, performance.now()]);
        for (const round of [0, 1]) {
            arrived.length = 0;
            const began = performance.now();
            for (const i of count(10)) {
                sender.text(`${round} ${i}`);
                await setTimeout(20);
            }
            while (arrived.length < 10 && performance.now() < began + 5000 * SLOW)
                await setTimeout(5);
            assert.deepEqual(arrived.map(([text]) => text),
                count(10).map((i) => `${round} ${i}`));
            const times = arrived.map(([, at]) => at - began);
            assert.ok(times[0] < window / 2 * SLOW, `first after ${times[0]} ms`);
            assert.ok(times[1] > window / 2, `second after ${times[1]} ms`);
            assert.ok(times[1] < window + 200 * SLOW, `second after ${times[1]} ms`);
            assert.ok(times[9] - times[1] < 20 * SLOW,
                `gathered ones over ${times[9] - times[1]} ms`);
            await setTimeout(2 * window);   // a quiet spell
        }
    });

test('--coalesce: a quarter of the ring goes out before the time is up',
    async (t) => {
        const window = 1000;
        const server = await startServer(t, {
            args: ['--ring', '64K', '--coalesce', String(window)] });
        const sender = await server.connect('/ws/gathered');
        const member = await server.connect('/ws/gathered');
        sender.text('first');
        await member.message();
        const began = performance.now();
        for (const i of count(20))
            sender.text(String(i).padEnd(1000, '.'));
        await member.messages(16);
        const took = performance.now() - began;
        assert.ok(took < window / 2, `${took} ms`);
    });
