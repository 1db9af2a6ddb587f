// SPDX-License-Identifier: MIT
// Goal: readers that fall behind. A slow minority is cut loose (Close 1013 when
// it stands between two frames, else its socket is closed) and costs the others
// nothing; a slow majority slows the publishers instead, but only while it
// moves, and for no more than five seconds a minute.
//
// Every message starts with its number, so that whatever a member got can be
// checked to be a run without gap. All connect through a unix socket: what the
// kernel holds for a reader is then no more than --socket-buffer, and the same
// for all, while TCP buffers grow as they please.

import assert from 'node:assert/strict';
import path from 'node:path';
import { test as nodeTest } from 'node:test';
import { setImmediate, setTimeout } from 'node:timers/promises';
import { connect, frame, OP } from './lib/raw.js';
import { SLOW, startServer, temporaryFolder } from './lib/server.js';

const { TEXT, CLOSE } = OP;
const K = 1024;
const SLOW_CLOSES = 'collabd_closes_total{reason="slow"}';
const count = (n, from = 0) => Array.from({ length: n }, (_, i) => i + from);
const test = (name, body) => nodeTest(name, { timeout: 60000 * SLOW }, body);

async function start(t, { ring = '64K', args = [] } = {}) {
    const unix = path.join(temporaryFolder(t), 'socket');
    const server = await startServer(t, { args: ['--listen', `unix:${unix}`,
        '--ring', ring, '--socket-buffer', '16K', ...args] });
    server.unix = { unix, sockets: server.sockets };
    return server;
}

const join = (server, n, room = '/ws/room') => Promise.all(count(n).map(() =>
    connect(server.unix, room)));

const numbered = (i, size) => frame(TEXT, String(i).padEnd(size, '.'),
    { mask: [0, 0, 0, 0] });

// Publishes `n` messages of `size` bytes, as fast as the server takes them or
// with a pause of `gap` ms every `every` messages. In between others may read.
async function publish(peer, n, size, { gap = 0, every = 1 } = {}) {
    for (const i of count(n)) {
        await peer.send(numbered(i, size));
        await (gap && i % every === 0 ? setTimeout(gap) : setImmediate());
    }
}

// Takes what arrives, keeping numbers and times only: { numbers, times, close }.
function listen(peer) {
    const heard = { numbers: [], times: [], close: null };
    peer.onFrame = (f) => {
        if (f.opcode === CLOSE)
            heard.close = f.code;
        if (f.opcode !== TEXT)
            return;
        heard.numbers.push(parseInt(f.text));
        heard.times.push(performance.now());
    };
    return heard;
}

async function until(what, condition, ms = 10000 * SLOW) {
    for (const end = Date.now() + ms; !condition(); await setTimeout(5))
        assert.ok(Date.now() < end, `${what} did not come within ${ms} ms`);
}
const heardAll = (heard, n, ms) =>
    until(`message ${n}`, () => heard.numbers.length >= n, ms);

const noGap = (heard) => assert.deepEqual(heard.numbers,
    count(heard.numbers.length, heard.numbers[0] ?? 0));

// All of them read steadily, but only so many bytes every `ms` (with a bufferful
// on credit), so they stay side by side, closer than half a large ring.
function readSlowly(t, peers, size, ms) {
    const budgets = new Map(peers.map((peer) => [peer, 0]));
    const spend = (peer, n) => {
        budgets.set(peer, budgets.get(peer) - n);
        if (budgets.get(peer) > 0)
            peer.resume();
        else
            peer.pause();
    };
    peers.forEach((peer) => peer.socket.on('data', (d) => spend(peer, d.length)));
    const timer = setInterval(() =>
        peers.forEach((peer) => spend(peer, -size)), ms);
    t.after(() => clearInterval(timer));
}

// A member that was cut: after whole messages without a gap either a Close 1013
// or, in mid-frame, nothing but the end.
async function cutLoose(peer, heard) {
    await peer.closed();
    noGap(heard);
    if (heard.close === null)
        assert.ok(peer.decoder.rest > 0, 'closed between frames without a Close');
    else
        assert.equal(heard.close, 1013);
    return heard.close;
}

const longestGap = (times) => Math.max(...times.slice(1).map((at, i) =>
    at - times[i]));

// ----- a slow minority -----------------------------------------------------

test('a minority that stops reading is cut loose, the others lose nothing',
    async (t) => {
        const server = await start(t);
        const [publisher, ...members] = await join(server, 8);
        const heard = members.map(listen);
        const stopped = members.slice(0, 3);
        stopped.forEach((peer) => peer.pause());
        const n = 4000;
        const publishing = publish(publisher, n, 2 * K, { gap: 1, every: 8 });
        await server.waitForMetric(SLOW_CLOSES, 3, 15000 * SLOW);
        await Promise.all(stopped.map((peer, i) => cutLoose(peer, heard[i])));
        await publishing;
        for (const h of heard.slice(3)) {
            await heardAll(h, n);
            noGap(h);
            assert.ok(longestGap(h.times) < 500 * SLOW,
                `a pause of ${longestGap(h.times)} ms`);
        }
        for (const h of heard.slice(0, 3))
            assert.ok(h.numbers.length < n);
        assert.equal((await server.metrics())[SLOW_CLOSES], 3);
    });

test('a member that is cut between frames gets Close 1013', async (t) => {
    // Empty messages are frames of two bytes: a stopped reader stands between
    // two of them every other time, so among twelve some do.
    const server = await start(t);
    const [publisher, ...members] = await join(server, 30);
    const stopped = members.slice(0, 12), last = members.at(-1);
    const ignore = (peer) => (peer.onFrame = () => {});
    let received = 0, sent = 0, running = true;
    members.forEach(ignore);
    last.onFrame = () => received++;
    for (const [i, peer] of stopped.entries()) {
        await peer.ping('x'.repeat(i));     // shifts its stream by i bytes
        peer.onFrame = (f) => (peer.code = f.opcode === CLOSE ? f.code : null);
    }
    await setTimeout(50);
    stopped.forEach((peer) => peer.pause());

    const block = Buffer.concat(count(500).map(() =>
        frame(TEXT, '', { mask: [0, 0, 0, 0] })));
    const publishing = (async () => {
        for (; running; sent += 500) {
            await publisher.send(block);
            await setTimeout(1);
        }
    })();
    await server.waitForMetric(SLOW_CLOSES, 12, 30000 * SLOW);
    running = false;
    for (const peer of stopped) {
        await peer.closed();
        if (!peer.code)
            assert.equal(peer.decoder.rest, 1);     // in mid-frame
    }
    const codes = stopped.map((peer) => peer.code).filter(Boolean);
    assert.ok(codes.length > 0 && codes.every((code) => code === 1013), `${codes}`);
    await publishing;
    await until('all the rest', () => received === sent);
});

test('one reader that has stopped costs the others no time', async (t) => {
    const server = await start(t);
    const [publisher, stopped, ...members] = await join(server, 6);
    const last = members.at(-1);
    const round = async () => {
        const delays = [];
        for (const i of count(1000)) {
            const sentAt = performance.now();
            const arrived = new Promise((resolve) => (last.onFrame = resolve));
            await publisher.send(numbered(i, 4 * K));
            await arrived;
            delays.push(performance.now() - sentAt);
        }
        return delays.sort((a, b) => a - b)[990];
    };
    members.slice(0, -1).forEach(listen);
    listen(stopped);
    await round();                      // warm-up
    const without = await round();
    stopped.pause();
    const withOne = await round();
    assert.equal((await server.metrics())[SLOW_CLOSES], 1);
    assert.ok(withOne < 3 * without + 10 * SLOW,
        `p99 ${withOne} ms, without ${without} ms`);
});

test('large messages count for a stopped reader’s lag in full', async (t) => {
    const server = await start(t, { args: ['--max-message', '256K'] });
    const [publisher, stopped, ...members] = await join(server, 5);
    const heard = members.map(listen), old = listen(stopped);
    stopped.pause();
    const n = 60;
    const publishing = publish(publisher, n, 200 * K, { gap: 5 });
    await server.waitForMetric(SLOW_CLOSES, 1, 15000 * SLOW);
    await cutLoose(stopped, old);
    await publishing;
    for (const h of heard) {
        await heardAll(h, n, 20000 * SLOW);
        noGap(h);
    }
});

test('own messages are no lag: a publisher that does not read is not cut',
    async (t) => {
        const server = await start(t);
        const [publisher, ...members] = await join(server, 4);
        const heard = members.map(listen);
        publisher.pause();
        await publish(publisher, 3000, 2 * K);
        for (const h of heard) {
            await heardAll(h, 3000);
            noGap(h);
        }
        publisher.resume();
        members[0].send(numbered(7, 10));
        assert.equal(parseInt((await publisher.message()).text), 7);
        assert.equal((await server.metrics())[SLOW_CLOSES], 0);
    });

test('a member of another room notices nothing of a slow one', async (t) => {
    const server = await start(t);
    const [publisher, ...slow] = await join(server, 4);
    slow.forEach(listen);
    slow.forEach((peer) => peer.pause());
    const [a, b] = await join(server, 2, '/ws/other');
    let running = true;
    const publishing = (async () => {
        for (let i = 0; running; i++)
            await Promise.race([publisher.send(numbered(i, 16 * K)), setTimeout(50)]);
    })();
    const delays = [];
    for (const i of count(300)) {
        const sentAt = performance.now();
        a.text(String(i));
        assert.equal((await b.message()).text, String(i));
        delays.push(performance.now() - sentAt);
        await setTimeout(5);
    }
    running = false;
    await publishing;
    assert.ok(delays.sort((x, y) => x - y)[290] < 100 * SLOW, `${delays[290]} ms`);
});

// ----- a slow majority -----------------------------------------------------

test('a majority that reads slowly but steadily slows the publisher and loses ' +
    'nothing', async (t) => {
    const server = await start(t, { ring: '512K' });
    const [publisher, ...members] = await join(server, 5);
    const slow = members.slice(0, 3), n = 3500, size = 2 * K;
    const heard = members.map(listen);
    readSlowly(t, slow, 32 * K, 15);
    const began = performance.now();
    await publish(publisher, n, size);
    for (const h of heard) {
        await heardAll(h, n, 15000 * SLOW);
        noGap(h);
    }
    const took = performance.now() - began;
    assert.equal((await server.metrics())[SLOW_CLOSES], 0);
    // The fast member was served at the slow ones' pace: it was the publisher
    // that waited.
    const fast = heard.at(-1).times.at(-1) - began;
    assert.ok(took > 2500 && fast > 0.7 * took, `fast ${fast} ms of ${took} ms`);
});

test('a majority that has stopped holds up the room for two seconds, then is cut',
    async (t) => {
        // Nobody in the room is read meanwhile, and nobody is taken for dead.
        const server = await start(t, {
            args: ['--ping-interval', '1', '--dead-after', '2'] });
        const [publisher, fast, ...stopped] = await join(server, 5);
        const heard = listen(fast), old = stopped.map(listen);
        stopped.forEach((peer) => peer.pause());
        const n = 4000;
        const publishing = publish(publisher, n, 4 * K);
        await server.waitForMetric(SLOW_CLOSES, 3, 15000 * SLOW);
        await Promise.all(stopped.map((peer, i) => cutLoose(peer, old[i])));
        await heardAll(heard, n, 20000 * SLOW);
        noGap(heard);
        await publishing;
        assert.equal(publisher.how, null);
        const gap = longestGap(heard.times);
        assert.ok(gap > 1000 && gap < 3500 * SLOW, `held for ${gap} ms`);
    });

test('a majority that crawls holds up the room for five seconds a minute at most',
    async (t) => {
        const server = await start(t, { ring: '512K' });
        const [publisher, fast, ...slow] = await join(server, 5);
        const heard = listen(fast), old = slow.map(listen);
        readSlowly(t, slow, 8 * K, 50);
        const n = 6000, began = performance.now();
        const publishing = publish(publisher, n, 4 * K);
        await heardAll(heard, n, 40000 * SLOW);
        const took = performance.now() - began;
        noGap(heard);
        await publishing;
        assert.ok(took > 4000 && took < 9000 * SLOW, `${took} ms`);
        await server.waitForMetric(SLOW_CLOSES, 3);
        old.forEach(noGap);
    });
