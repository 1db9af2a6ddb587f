// SPDX-License-Identifier: MIT
// Goal: the server speaks WebSocket (RFC 6455) to the letter: fragments and the
// control frames between them, UTF-8 checked as it comes, the closing handshake
// with the right codes, every wrong frame refused, pings, peers that have gone,
// and a stream of bytes that may be cut anywhere.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { closePayload, fragments, frame, OP, upgradeRequest } from './lib/raw.js';
import { SLOW, startServer } from './lib/server.js';

const { CONT, TEXT, BINARY, CLOSE, PING, PONG } = OP;
const count = (n, from = 0) => Array.from({ length: n }, (_, i) => i + from);
const ECHO = '/ws/room?echo=1';

// Sends bytes on a connection of their own; expects to be closed with `code`
// and that nothing else came back but `before`, [opcode, text] pairs.
async function closedWith(server, code, data, before = []) {
    const peer = await server.connect(ECHO);
    peer.send(data);
    const { code: got, frames } = await peer.closed();
    const shown = data.subarray(0, 40).toString('hex');
    assert.equal(got, code, `after ${shown}…`);
    assert.deepEqual(frames.map((f) => [f.opcode, f.text]), before);
}

// ----- fragments -----------------------------------------------------------

test('control frames between fragments are answered before the message is whole',
    async (t) => {
        const server = await startServer(t);
        const peer = await server.connect(ECHO);
        const [one, two, three] = fragments(TEXT, null, ['ein', ' Tag', ' mehr']);
        peer.send(one, frame(PING, 'a'));
        assert.deepEqual((await peer.next()).text, 'a');
        peer.send(frame(PONG, 'nobody asked'), two, frame(PING, ''));
        const pong = await peer.next();
        assert.deepEqual([pong.opcode, pong.text], [PONG, '']);
        await peer.silent();
        peer.send(three);
        assert.equal((await peer.next()).text, 'ein Tag mehr');
    });

test('fragments of two members do not mix', async (t) => {
    const server = await startServer(t);
    const [a, b, member] = await Promise.all(count(3).map(() =>
        server.connect('/ws/mix')));
    const parts = [fragments(TEXT, null, ['a1', 'a2', 'a3']),
        fragments(BINARY, null, ['b1', 'b2', 'b3'])];
    for (const i of count(3)) {
        await a.send(parts[0][i]);
        await b.send(parts[1][i]);
        await setTimeout(20);
    }
    const got = await member.messages(2);
    assert.deepEqual(got.map((m) => [m.opcode, m.text]).sort(),
        [[TEXT, 'a1a2a3'], [BINARY, 'b1b2b3']]);
});

test('fragments out of order are Close 1002', async (t) => {
    const server = await startServer(t);
    const begin = frame(TEXT, 'begin', { fin: false });
    const bad = [
        frame(CONT, 'of nothing'),
        frame(CONT, 'of nothing', { fin: false }),
        Buffer.concat([begin, frame(TEXT, 'again')]),
        Buffer.concat([begin, frame(BINARY, 'again', { fin: false })]),
    ];
    for (const data of bad)
        await closedWith(server, 1002, data);
    await closedWith(server, 1002, Buffer.concat([begin, frame(CONT, ' end'),
        frame(CONT, 'too much')]), [[TEXT, 'begin end']]);
});

test('a Close within a message ends the connection, the message is dropped',
    async (t) => {
        const server = await startServer(t);
        const member = await server.connect(ECHO);
        await closedWith(server, 1000, Buffer.concat([
            frame(TEXT, 'half', { fin: false }), frame(CLOSE, closePayload(1000)),
            frame(CONT, ' a message')]));
        await member.silent();
    });

// ----- UTF-8 ---------------------------------------------------------------

test('a character may be cut anywhere by fragments with pings between them',
    async (t) => {
        const server = await startServer(t);
        const peer = await server.connect(ECHO);
        for (const text of ['é', '€', '𤭢', 'κόσμε', 'aé€𤭢z']) {
            for (const size of [1, 2, 3]) {
                const parts = fragments(TEXT, Buffer.from(text), size);
                peer.send(parts.flatMap((part, i) =>
                    (i ? [frame(PING, String(i)), part] : [part])));
                for (const i of count(parts.length - 1, 1))
                    assert.equal((await peer.next()).text, String(i));
                assert.equal((await peer.next()).text, text);
            }
        }
    });

test('a text that ends within a character is Close 1007', async (t) => {
    const server = await startServer(t);
    for (const text of ['é', '€', '𤭢']) {
        const data = Buffer.from(`text ${text}`);
        for (const missing of count(data.length - 6, 1)) {
            const cut = data.subarray(0, -missing);
            await closedWith(server, 1007, frame(TEXT, cut));
            await closedWith(server, 1007,
                Buffer.concat(fragments(TEXT, null, [cut, '', ''])));
        }
    }
});

test('a wrong byte is Close 1007 at once, in whatever part of a message it comes',
    async (t) => {
        const server = await startServer(t);
        const bad = ['80', 'c0', 'c1bf', 'e080', 'eda0', 'f08f', 'f490', 'f5', 'ff'];
        for (const hex of bad) {
            const data = Buffer.concat([Buffer.from('fine '),
                Buffer.from(hex, 'hex')]);
            // the frame goes on for 1000 bytes that are never sent
            await closedWith(server, 1007, frame(TEXT, data, { length: 1000 }));
            await closedWith(server, 1007, frame(TEXT, data, { fin: false }));
            await closedWith(server, 1007, Buffer.concat([
                frame(TEXT, data.subarray(0, -1), { fin: false }),
                frame(CONT, data.subarray(-1), { fin: false })]));
        }
    });

test('a wrong byte far into a long text is found', async (t) => {
    const server = await startServer(t);
    for (const at of [4095, 4096, 65535, 65536, 299999]) {
        const data = Buffer.alloc(300000, 'x');
        data[at] = 0xff;
        await closedWith(server, 1007, frame(TEXT, data));
    }
});

test('binary messages may hold any bytes', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect(ECHO);
    const bytes = Buffer.from([...count(256), 0xed, 0xa0, 0x80, 0xff]);
    peer.send(frame(BINARY, bytes), fragments(BINARY, bytes, 3));
    for (const m of await peer.messages(2))
        assert.deepEqual([m.opcode, m.data], [BINARY, bytes]);
});

// ----- closing -------------------------------------------------------------

test('every code a client may send is echoed, and the connection ends',
    async (t) => {
        const server = await startServer(t);
        const good = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012,
            1013, 1014, 3000, 3999, 4000, 4400, 4403, 4499, 4500, 4513, 4599, 4999];
        for (const code of good) {
            const peer = await server.connect(ECHO);
            peer.close(code, 'gründlich');
            const end = await peer.closed();
            assert.deepEqual([end.code, end.how, end.frames.length],
                [code, 'fin', 0]);
        }
    });

test('an empty Close is answered by an empty one or 1000', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect(ECHO);
    peer.close();
    const { code, how } = await peer.closed();
    assert.ok([1000, 1005].includes(code), String(code));
    assert.equal(how, 'fin');
});

test('a code that nobody may send, or half a code, is Close 1002', async (t) => {
    const server = await startServer(t);
    for (const code of [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 1999, 2000,
        2999, 5000, 65535])
        await closedWith(server, 1002, frame(CLOSE, closePayload(code)));
    await closedWith(server, 1002, frame(CLOSE, 'x'));
});

test('a reason may have 123 bytes of UTF-8, and must be UTF-8', async (t) => {
    const server = await startServer(t);
    const close = (reason) => frame(CLOSE, closePayload(1000, reason));
    await closedWith(server, 1000, close('ü'.repeat(61) + '!'));
    await closedWith(server, 1002, close('ü'.repeat(62)));
    await closedWith(server, 1007, close(Buffer.from([0xff])));
    await closedWith(server, 1007, close(Buffer.from('fine é').subarray(0, -1)));
});

test('nothing after a Close counts', async (t) => {
    const server = await startServer(t);
    const member = await server.connect(ECHO);
    await closedWith(server, 1000, Buffer.concat([
        frame(CLOSE, closePayload(1000)), frame(PING, 'late'), frame(TEXT, 'late'),
        frame(TEXT, 'wrong', { mask: false, rsv: 7 })]));
    await member.silent();
});

test('what was sent before a Close, or before a mistake, is relayed', async (t) => {
    const server = await startServer(t);
    for (const [last, code] of [[frame(CLOSE, closePayload(4000)), 4000],
        [frame(3, 'wrong'), 1002], [frame(TEXT, Buffer.from([0xff])), 1007]]) {
        const member = await server.connect('/ws/room');
        await closedWith(server, code, Buffer.concat([frame(TEXT, 'one'),
            frame(TEXT, 'two'), last]), [[TEXT, 'one'], [TEXT, 'two']]);
        assert.deepEqual((await member.messages(2)).map((m) => m.text),
            ['one', 'two']);
        await member.silent(20);
        member.socket.destroy();
    }
});

test('a client that goes on sending still gets the Close that says why',
    async (t) => {
        const server = await startServer(t);
        await closedWith(server, 1002, Buffer.concat([frame(3, 'wrong'),
            Buffer.alloc(300000, 'and so on ')]));
    });

test('a client that does not answer a Close is dropped soon', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect(ECHO, { autoClose: false });
    const started = Date.now();
    peer.send(frame(3));
    const { code } = await peer.closed();
    assert.equal(code, 1002);
    assert.ok(Date.now() - started < 3000 * SLOW);
});

test('a client that leaves without a Close leaves its room', async (t) => {
    const server = await startServer(t);
    const none = (await server.metrics()).collabd_clients;
    const ways = [(peer) => peer.end(), (peer) => peer.reset(),
        async (peer) => {
            await peer.send(frame(TEXT, 'half a frame').subarray(0, 9));
            peer.end();
        }];
    for (const leave of ways) {
        const peer = await server.connect(ECHO);
        await server.waitForMetric('collabd_clients', none + 1);
        leave(peer);
        await server.waitForMetric('collabd_clients', none, 1000 * SLOW);
    }
});

test('SIGTERM: everyone gets 1001 and the server is gone within two seconds',
    async (t) => {
        const server = await startServer(t);
        const peers = await Promise.all(count(5).map(() => server.connect(ECHO)));
        const rude = await server.connect(ECHO, { autoClose: false });
        const deaf = await server.connect(ECHO);
        deaf.pause();
        peers[0].text('last words');
        const started = Date.now();
        server.signal('SIGTERM');
        for (const peer of [...peers, rude]) {
            const { code, how } = await peer.closed();
            assert.deepEqual([code, how], [1001, 'fin']);
        }
        assert.deepEqual(await server.gone, { code: 0, signal: null });
        assert.ok(Date.now() - started < 2000 + 500 * SLOW);
    });

test('SIGTERM: when all answer the Close, the server need not wait', async (t) => {
    const server = await startServer(t);
    await Promise.all(count(5).map(() => server.connect(ECHO)));
    const started = Date.now();
    await server.stop({ keepClients: true });
    assert.ok(Date.now() - started < 1000 * SLOW, `${Date.now() - started} ms`);
});

// ----- wrong frames --------------------------------------------------------

test('unmasked frames are Close 1002', async (t) => {
    const server = await startServer(t);
    for (const opcode of [TEXT, BINARY, PING, PONG, CLOSE])
        for (const payload of ['', 'hello', 'x'.repeat(125)])
            await closedWith(server, 1002, frame(opcode,
                opcode === CLOSE ? closePayload(1000, payload.slice(2)) : payload,
                { mask: false }));
    await closedWith(server, 1002, Buffer.concat([
        frame(TEXT, 'masked', { fin: false }), frame(CONT, 'not', { mask: false })]));
});

test('reserved bits and opcodes are Close 1002', async (t) => {
    const server = await startServer(t);
    for (const rsv of count(7, 1))
        for (const opcode of [TEXT, BINARY, PING, CLOSE])
            await closedWith(server, 1002, frame(opcode, '', { rsv }));
    await closedWith(server, 1002, Buffer.concat([
        frame(TEXT, 'good', { fin: false }), frame(CONT, 'not', { rsv: 4 })]));
    for (const opcode of [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
        for (const payload of ['', 'hello'])
            await closedWith(server, 1002, frame(opcode, payload));
});

test('control frames that are long or fragmented are Close 1002', async (t) => {
    const server = await startServer(t);
    for (const opcode of [PING, PONG, CLOSE]) {
        await closedWith(server, 1002, frame(opcode, Buffer.alloc(126, 3)));
        await closedWith(server, 1002, frame(opcode, '', { fin: false }));
        await closedWith(server, 1002, frame(opcode, 'x', { form: 16 }));
    }
});

test('lengths that are not minimal, or above 2^63, are Close 1002', async (t) => {
    const server = await startServer(t);
    for (const [size, form] of [[0, 16], [1, 16], [125, 16], [0, 64], [125, 64],
        [126, 64], [65535, 64]])
        await closedWith(server, 1002, frame(TEXT, 'x'.repeat(size), { form }));
    await closedWith(server, 1002, frame(BINARY, 'x',
        { form: 64, length: 2n ** 63n }));
    await closedWith(server, 1002, frame(BINARY, 'x',
        { form: 64, length: 2n ** 64n - 1n }));
});

test('a mistake is no one else’s: the room goes on', async (t) => {
    const server = await startServer(t);
    const [a, b] = [await server.connect(ECHO), await server.connect(ECHO)];
    for (const wrong of [frame(TEXT, 'x', { mask: false }), frame(11),
        frame(TEXT, Buffer.from([0xff])), frame(CONT)]) {
        await closedWith(server, wrong[0] === 0x81 && wrong[1] > 0x80 ? 1007 : 1002,
            wrong);
        a.text('still here');
        assert.equal((await a.message()).text, 'still here');
        assert.equal((await b.message()).text, 'still here');
    }
});

// ----- pings and dead peers ------------------------------------------------

test('who answers pings or sends any byte lives, who is silent is gone',
    async (t) => {
        const server = await startServer(t, {
            args: ['--ping-interval', '1', '--dead-after', '3'] });
        const answers = await server.connect(ECHO);
        const silent = await server.connect(ECHO, { autoPong: false });
        const trickles = await server.connect(ECHO, { autoPong: false });
        const started = Date.now();
        const message = 'slowly, byte by byte...';
        trickles.chop(frame(TEXT, message), 1, 250);

        const { frames } = await silent.closed(10000 * SLOW);
        const lived = Date.now() - started;
        // "within": deadlines are rounded down to whole seconds
        assert.ok(lived > 1900 && lived < 3000 + 300 * SLOW, `${lived} ms`);
        assert.ok(frames.some((f) => f.opcode === PING));

        await setTimeout(started + 6500 - Date.now());
        for (const peer of [answers, trickles])
            assert.equal(peer.how, null);
        assert.ok(answers.frames.filter((f) => f.opcode === PING).length >= 3);
        assert.equal((await answers.message()).text, message);
    });

test('600 pings in one write get pongs in order, the last one always', async (t) => {
    const server = await startServer(t);
    for (const paused of [false, true]) {
        const peer = await server.connect(ECHO);
        if (paused)
            peer.pause();
        await peer.send(...count(600).map((i) => frame(PING, String(i).padEnd(100))));
        if (paused)
            await setTimeout(200);
        peer.resume();
        const seen = [];
        do
            seen.push(Number((await peer.next()).text));
        while (seen.at(-1) !== 599);
        assert.ok(seen.every((n, i) => i === 0 || n > seen[i - 1]), seen.join(' '));
        peer.text('and on');
        assert.equal((await peer.message()).text, 'and on');
    }
});

test('pings between messages are answered whatever the room does', async (t) => {
    const server = await startServer(t);
    const noisy = await server.connect('/ws/noise');
    const peer = await server.connect('/ws/noise');
    for (const i of count(200)) {
        noisy.text('noise '.repeat(i));
        if (i % 10 === 0)
            peer.ping(String(i));
    }
    const got = [];
    while (got.length < 220)
        got.push(await peer.next());
    assert.deepEqual(got.filter((f) => f.opcode === PONG).map((f) => f.text),
        count(20).map((i) => String(10 * i)));
    assert.deepEqual(got.filter((f) => f.opcode === TEXT).map((f) => f.data.length),
        count(200).map((i) => 6 * i));
});

// ----- the stream ----------------------------------------------------------

test('bytes that come with the upgrade request are part of the stream',
    async (t) => {
        const server = await startServer(t);
        const long = 'x'.repeat(50000);
        const all = Buffer.concat([frame(TEXT, 'one'), frame(PING, 'ping'),
            ...fragments(TEXT, null, ['t', 'wo']), frame(TEXT, long)]);
        for (const size of [1, 8, all.length - long.length, 4000, all.length]) {
            const peer = await server.connect(ECHO, { with: all.subarray(0, size) });
            peer.send(all.subarray(size));
            const got = [];
            while (got.length < 4)
                got.push((await peer.next()).text);
            // a Pong may overtake messages, these never each other
            assert.deepEqual(got.filter((text) => text !== 'ping'),
                ['one', 'two', long]);
            peer.socket.destroy();
        }
        const peer = await server.connect(ECHO, { with: frame(3, 'wrong') });
        assert.equal((await peer.closed()).code, 1002);
    });

test('requests and frames may come byte by byte', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect(ECHO, { chop: 1, with: frame(TEXT, 'one') });
    assert.equal((await peer.message()).text, 'one');
    await peer.chop(Buffer.concat([frame(TEXT, 'zwei €'), frame(PING, 'p'),
        ...fragments(BINARY, null, ['', 'dr', '', 'ei']),
        frame(TEXT, 'x'.repeat(200)), frame(TEXT, '')]));
    const got = [];
    while (got.length < 5)
        got.push(await peer.next());
    assert.deepEqual(got.filter((f) => f.opcode !== PONG).map((f) => f.text),
        ['zwei €', 'drei', 'x'.repeat(200), '']);
});

test('many frames in one packet are all taken, in order', async (t) => {
    const server = await startServer(t);
    const peer = await server.connect(ECHO);
    peer.send(...count(5000).map((i) => frame(TEXT, String(i))));
    const got = await peer.messages(5000, 20000 * SLOW);
    assert.deepEqual(got.map((m) => Number(m.text)), count(5000));
});

test('a stream may be cut at every byte', async (t) => {
    const server = await startServer(t, { args: ['--max-rooms', '300'] });
    const stream = Buffer.concat([frame(TEXT, 'é1'), frame(PING, 'two'),
        ...fragments(TEXT, Buffer.from('€'), 1), frame(BINARY, 'x'.repeat(130))]);
    await Promise.all(count(stream.length - 1, 1).map(async (at) => {
        const peer = await server.connect(`/ws/cut-${at % 40}-${at}?echo=1`);
        await peer.send(stream.subarray(0, at));
        await setTimeout(5);
        peer.send(stream.subarray(at));
        const got = [];
        while (got.length < 4)
            got.push((await peer.next()).text);
        assert.deepEqual(got.filter((text) => text !== 'two'),
            ['é1', '€', 'x'.repeat(130)], `cut at ${at}`);
        peer.close(1000);
        await peer.closed();
    }));
});

test('a frame that never ends holds up no one else', async (t) => {
    const server = await startServer(t);
    const stuck = await Promise.all(count(40).map(async () => {
        const peer = await server.connect(ECHO);
        peer.send(frame(TEXT, 'begun', { length: 100 }));
        return peer;
    }));
    const peer = await server.connect(ECHO);
    peer.text('hello');
    assert.equal((await peer.message()).text, 'hello');
});
