// Goal: readers that fall behind. A slow minority is cut loose (Close 1013 when
// it stands between two frames, else its socket is closed) and costs the others
// nothing; a slow majority slows the publishers instead, but only while it
// moves, and for no more than five seconds a minute.
//
// Every message starts with its number, so that whatever a member got can be
// checked to be a run without gap. How much a reader that has stopped may still
// take is up to the kernels' buffers (some 100 KiB up to a few MiB), which is why
// the amounts below are large.

import assert from 'node:assert/strict';
import { test as nodeTest } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { frame, OP } from './lib/raw.js';
import { SLOW, startServer } from './lib/server.js';

const { TEXT, CLOSE } = OP;
const K = 1024, M = K * K;
const ROOM = '/ws/room';
const SMALL = ['--ring', '64K', '--socket-buffer', '16K'];
const SLOW_CLOSES = 'collabd_closes_total{reason="slow"}';
const count = (n, from = 0) => Array.from({ length: n }, (_, i) => i + from);
const test = (name, body) => nodeTest(name, { timeout: 60000 * SLOW }, body);
const join = (server, n, opt) => Promise.all(count(n).map(() =>
    server.connect(ROOM, opt)));

const numbered = (i, size) => frame(TEXT, String(i).padEnd(size, '.'),
    { mask: [0, 0, 0, 0] });

// Publishes `n` messages of `size` bytes, as fast as the server takes them or
// with a pause of `gap` ms every `every` messages.
async function publish(peer, n, size, { gap = 0, every = 1, from = 0 } = {}) {
    for (const i of count(n, from)) {
        await peer.send(numbered(i, size));
        if (gap && i % every === 0)
            await setTimeout(gap);
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

// Reads steadily, but no more than a chunk (64 KiB) every `ms`.
function readSlowly(peer, ms) {
    peer.socket.on('data', () => {
        peer.pause();
        globalThis.setTimeout(() => peer.resume(), ms);
    });
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
        const server = await startServer(t, { args: SMALL });
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
    const server = await startServer(t, { args: SMALL });
    const [publisher, ...members] = await join(server, 30);
    const stopped = members.slice(0, 12);
    const ends = stopped.map((peer, i) => {
        peer.ping('x'.repeat(i));       // shifts its stream by i bytes
        peer.onFrame = () => {};
        return peer;
    });
    let received = 0;
    members[29 - 1].onFrame = () => received++;
    members.slice(12, 28).forEach((peer) => (peer.onFrame = () => {}));
    await setTimeout(50);
    stopped.forEach((peer) => {
        peer.pause();
        peer.onFrame = (f) => (peer.last = f.opcode === CLOSE ? f.code : null);
    });
    const block = Buffer.alloc(6 * 1000);
    for (let i = 0; i < block.length; i += 6)
        block.set([0x81, 0x80], i);
    let sent = 0, running = true;
    const publishing = (async () => {
        for (; running && sent < 5e6; sent += 1000)
            await publisher.send(block);
    })();
    await server.waitForMetric(SLOW_CLOSES, 12, 30000 * SLOW);
    running = false;
    const codes = await Promise.all(ends.map(async (peer) => {
        await peer.closed();
        if (!peer.last)
            assert.equal(peer.decoder.rest, 1);
        return peer.last;
    }));
    await publishing;
    await until('all the rest', () => received === sent);
    assert.ok(codes.includes(1013), `closed with ${codes}`);
    assert.deepEqual(codes.filter((code) => code && code !== 1013), []);
});

test('one reader that has stopped costs the others no time', async (t) => {
    const server = await startServer(t, { args: SMALL });
    const [publisher, stopped, ...members] = await join(server, 6);
    const last = members.at(-1);
    const round = async () => {
        const delays = [];
        let sentAt;
        last.onFrame = (f) => f.opcode === TEXT &&
            delays.push(performance.now() - sentAt);
        for (const i of count(1000)) {
            sentAt = performance.now();
            await publisher.send(numbered(i, 4 * K));
            await until('a message', () => delays.length > i);
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
    const server = await startServer(t, {
        args: [...SMALL, '--max-message', '256K'] });
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
        const server = await startServer(t, { args: SMALL });
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
    const server = await startServer(t, { args: SMALL });
    const [publisher, ...slow] = await join(server, 4);
    slow.forEach(listen);
    slow.forEach((peer) => peer.pause());
    const a = await server.connect('/ws/other'), b = await server.connect('/ws/other');
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
    const server = await startServer(t, {
        args: [...SMALL, '--ping-interval', '1', '--dead-after', '2'] });
    const [publisher, ...members] = await join(server, 5);
    const slow = members.slice(0, 3), n = 3500, size = 4 * K;
    const heard = members.map(listen);
    slow.forEach((peer) => readSlowly(peer, 15));
    const began = performance.now();
    await publish(publisher, n, size);
    for (const h of heard) {
        await heardAll(h, n, 15000 * SLOW);
        noGap(h);
    }
    const took = performance.now() - began;
    assert.equal((await server.metrics())[SLOW_CLOSES], 0);
    // The fast member was served at the slow ones' pace: it was the publisher
    // that waited. (And unread for more than --dead-after, it was not dead.)
    const fast = heard.at(-1).times;
    assert.ok(fast.at(-1) - began > 0.6 * took,
        `fast ${fast.at(-1) - began} ms of ${took} ms`);
    assert.equal(publisher.how, null);
});

test('a majority that has stopped holds up the room for two seconds, then is cut',
    async (t) => {
        const server = await startServer(t, { args: SMALL });
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
        const gap = longestGap(heard.times);
        assert.ok(gap > 1000 && gap < 3500 * SLOW, `held for ${gap} ms`);
    });

test('a majority that crawls holds up the room for five seconds a minute at most',
    async (t) => {
        const server = await startServer(t, { args: SMALL });
        const [publisher, fast, ...slow] = await join(server, 5);
        const heard = listen(fast), old = slow.map(listen);
        slow.forEach((peer) => readSlowly(peer, 400));
        const n = 6000, began = performance.now();
        const publishing = publish(publisher, n, 4 * K);
        await heardAll(heard, n, 40000 * SLOW);
        const took = performance.now() - began;
        noGap(heard);
        await publishing;
        assert.ok(took > 2500 && took < 9000 * SLOW, `${took} ms`);
        await server.waitForMetric(SLOW_CLOSES, 3);
        old.forEach(noGap);
    });
