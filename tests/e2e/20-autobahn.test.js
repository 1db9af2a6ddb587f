// SPDX-License-Identifier: MIT
// Goal: the server passes, strictly, every case of the Autobahn test suite's
// sections 1 to 7, 9 and 10 (fuzzing client against a server): 301 cases under
// the suite's own numbers. The channel is an echo server by ?echo=1.
//
// A case is what is sent and what must come back. "Strictly" means: what was
// sent before a fault is echoed, then comes a Close with the right code, and
// nothing after it. The suite also accepts a dropped connection; we do not.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { closePayload, cut, fragments, frame, OP } from './lib/raw.js';
import { SLOW, startServer } from './lib/server.js';

const { CONT, TEXT, BINARY, CLOSE, PING, PONG } = OP;
const K = 1024, M = K * K;
const PAUSE = 250;      // the suite waits a second where it wants to see that
                        // something does, or does not, happen meanwhile
const WHOLE = 'whole', FRAMES = 'frames', OCTETS = 1;   // how bytes are chopped

// ----- what a case is ------------------------------------------------------

// Sends `frames` and expects the [opcode, payload] pairs of `back`; after that
// we close and get our 1000 back, or, with `fail`, the server has closed with
// that code (or one of these codes).
const exchange = (frames, back, { chop = WHOLE, fail } = {}) => async (peer) => {
    const sent = send(peer, frames, chop);
    for (const expected of back)
        same(await peer.next(60000 * SLOW), expected);
    if (!fail) {
        await sent;
        peer.close(1000);
    }
    ended(await peer.closed(), fail ?? 1000);
    if (!fail)
        assert.equal(peer.how, 'fin');
};
const echo = (opcode, payload, opt) =>
    exchange([frame(opcode, payload)], [[opcode, payload]], opt);
const refuse = (frames, chop, code = 1002) =>
    exchange(frames, [], { chop, fail: code });

// Sends frames the last of which begin a Close; expects one with `codes`.
const closing = (frames, codes, back = []) => exchange(frames, back,
    { fail: codes });

async function send(peer, frames, chop) {
    if (chop === WHOLE)
        return peer.send(...frames);
    if (chop === FRAMES)
        return frames.reduce((before, f) =>
            before.then(() => peer.chop(f, f.length)), Promise.resolve());
    return peer.chop(Buffer.concat(frames), chop);
}

function same(got, [opcode, payload]) {
    const data = Buffer.from(payload);
    assert.deepEqual([got.opcode, got.fin, got.data.length],
        [opcode, true, data.length]);
    assert.ok(got.data.equals(data), 'the payload has changed');
}

function ended({ code, frames }, codes) {
    assert.deepEqual(frames.map((f) => [f.opcode, f.text]), []);
    assert.ok([codes].flat().includes(code), `closed with ${code}, not ${codes}`);
}

// ----- the cases -----------------------------------------------------------

const cases = [];       // [number, what, run]
// Adds cases section.1, section.2, … from pairs [what, run].
const section = (number, ...list) => list.forEach(([what, run], i) =>
    cases.push([`${number}.${i + 1}`, what, run]));

const bytesOf = (text, size) => Buffer.alloc(size, text);
const HELLO = 'Hello, world!';
const ODD = Buffer.from('00fffefdfcfb00ff', 'hex');
const hello = frame(TEXT, HELLO);

// 1: framing
for (const [i, opcode, fill] of [[1, TEXT, '*'], [2, BINARY, '\xfe']])
    section(`1.${i}`, ...[0, 125, 126, 127, 128, 65535, 65536].map((size) =>
        [`${size} bytes`, echo(opcode, bytesOf(Buffer.from(fill, 'latin1'), size))]),
    ['65536 bytes in chops of 997',
        echo(opcode, bytesOf(Buffer.from(fill, 'latin1'), 65536), { chop: 997 })]);

// 2: pings and pongs
const ping = (payload, opt) =>
    exchange([frame(PING, payload)], [[PONG, payload]], opt);
const ten = Array.from({ length: 10 }, (_, i) => `payload-${i}`);
const tenPings = (chop) => exchange(ten.map((p) => frame(PING, p)),
    ten.map((p) => [PONG, p]), { chop });
section('2',
    ['an empty ping', ping('')],
    ['a ping with text', ping(HELLO)],
    ['a ping with bytes', ping(ODD)],
    ['a ping of 125 bytes', ping(bytesOf([0xfe], 125))],
    ['a ping of 126 bytes', refuse([frame(PING, bytesOf([0xfe], 126))])],
    ['a ping of 125 bytes, byte by byte',
        ping(bytesOf([0xfe], 125), { chop: OCTETS })],
    ['an empty pong', exchange([frame(PONG)], [])],
    ['a pong with payload', exchange([frame(PONG, 'not asked for')], [])],
    ['a pong, then a ping', exchange(
        [frame(PONG, 'not asked for'), frame(PING, 'asked')], [[PONG, 'asked']])],
    ['ten pings', tenPings(WHOLE)],
    ['ten pings, byte by byte', tenPings(OCTETS)]);

// 3: reserved bits
const afterHello = (wrong, chop) => exchange([hello, wrong, frame(PING)],
    [[TEXT, HELLO]], { chop, fail: 1002 });
section('3',
    ['rsv 1', refuse([frame(TEXT, HELLO, { rsv: 1 })])],
    ['rsv 2 after a good message', afterHello(frame(TEXT, HELLO, { rsv: 2 }))],
    ['rsv 3, frame by frame', afterHello(frame(TEXT, HELLO, { rsv: 3 }), FRAMES)],
    ['rsv 4, byte by byte', afterHello(frame(TEXT, HELLO, { rsv: 4 }), OCTETS)],
    ['rsv 5 on a binary message', refuse([frame(BINARY, ODD, { rsv: 5 })])],
    ['rsv 6 on a ping', refuse([frame(PING, HELLO, { rsv: 6 })])],
    ['rsv 7 on a Close', refuse([frame(CLOSE, '', { rsv: 7 })])]);

// 4: opcodes without a meaning
for (const [i, first] of [[1, 3], [2, 11]])
    section(`4.${i}`,
        [`opcode ${first}`, refuse([frame(first)])],
        [`opcode ${first + 1} with payload`, refuse([frame(first + 1, HELLO)])],
        [`opcode ${first + 2} after a good message`, afterHello(frame(first + 2))],
        [`opcode ${first + 3} with payload after a good message`,
            afterHello(frame(first + 3, HELLO))],
        [`opcode ${first + 4}, byte by byte`,
            afterHello(frame(first + 4, HELLO), OCTETS)]);

// 5: fragmentation
const begin = (data, opcode = TEXT) => frame(opcode, data, { fin: false });
const go = (data) => frame(CONT, data, { fin: false });
const finish = (data) => frame(CONT, data);
const chops = [['in one write', WHOLE], ['frame by frame', FRAMES],
    ['byte by byte', OCTETS]];
const twice = (list) => [...list, ...list];
// Five fragments with two pings between them, which are answered at once.
const pingedFragments = (chop) => async (peer) => {
    await send(peer, [begin('one'), go('two'), frame(PING, 'first')], chop);
    same(await peer.next(), [PONG, 'first']);
    await setTimeout(PAUSE);
    await exchange([go('three'), go('four'), frame(PING, 'second'),
        finish('five')], [[PONG, 'second'], [TEXT, 'onetwothreefourfive']],
    { chop })(peer);
};
section('5',
    ['a ping in two fragments', refuse([begin('one', PING), finish('two')])],
    ['a pong in two fragments', refuse([begin('one', PONG), finish('two')])],
    ...chops.map(([how, chop]) => [`a message in two fragments, ${how}`,
        exchange([begin('one'), finish('two')], [[TEXT, 'onetwo']], { chop })]),
    ...chops.map(([how, chop]) => [`with a ping between them, ${how}`,
        exchange([begin('one'), frame(PING, 'ping'), finish('two')],
            [[PONG, 'ping'], [TEXT, 'onetwo']], { chop })]),
    ...chops.map(([how, chop]) => [`a last fragment of nothing, ${how}`,
        refuse([finish('one'), hello], chop)]),
    ...chops.map(([how, chop]) => [`a further fragment of nothing, ${how}`,
        refuse([go('one'), hello], chop)]),
    ['two good fragments, then one of nothing', exchange([begin('one'),
        finish('two'), go('three'), frame(TEXT, 'four')], [[TEXT, 'onetwo']],
    { fail: 1002 })],
    ['twice a further fragment of nothing, then two good ones',
        refuse(twice([go('one'), begin('two'), finish('three')]))],
    ['twice a last fragment of nothing, then two good ones',
        refuse(twice([finish('one'), begin('two'), finish('three')]))],
    ['a message begun within another', refuse([begin('one'),
        frame(TEXT, 'two')])],
    ['five fragments and two pings', pingedFragments(WHOLE)],
    ['five fragments and two pings, frame by frame', pingedFragments(FRAMES)]);

// 6: UTF-8. 6.1 to 6.4 by hand, 6.5 to 6.23 from tables.
const GREETING = Buffer.from('Hello-µ@ßöäüàá-UTF-8!!');
const KOSME = Buffer.from('κ\u1f79σμε');
const SURROGATE = Buffer.concat([KOSME, Buffer.from('eda080', 'hex'),
    Buffer.from('edited')]);
const TOO_HIGH = Buffer.concat([KOSME, Buffer.from('f4908080', 'hex'),
    Buffer.from('edited')]);    // wrong from byte 12 on
const inFragments = (data, size) =>
    exchange(fragments(TEXT, data, size), [[TEXT, data]]);
// Sends parts with a pause after each and expects to be closed after the second.
const failFast = (parts) => async (peer) => {
    await peer.send(parts[0]);
    await peer.silent(PAUSE);
    await peer.send(parts[1]);
    ended(await peer.closed(1000 * SLOW), 1007);
};
const asFrames = (...ends) => cutAt(TOO_HIGH, ends).map((part, i) =>
    frame(i ? CONT : TEXT, part, { fin: i === ends.length }));
const asOneFrame = (...ends) => cutAt(frame(TEXT, TOO_HIGH),
    ends.map((end) => end + 6));
const cutAt = (data, ends) => [...ends, data.length].map((end, i) =>
    data.subarray(ends[i - 1] ?? 0, end));
section('6.1',
    ['an empty message', echo(TEXT, '')],
    ['three empty fragments', inFragments('', ['', '', ''])],
    ['an empty, a full, an empty fragment',
        exchange(fragments(TEXT, null, ['', 'middle', '']), [[TEXT, 'middle']])]);
section('6.2',
    ['valid UTF-8', echo(TEXT, GREETING)],
    ['cut between code points', exchange(fragments(TEXT, null,
        cutAt(GREETING, [14])), [[TEXT, GREETING]])],
    ['cut at every byte', inFragments(GREETING, 1)],
    ['cut at every byte, Greek', inFragments(KOSME, 1)]);
section('6.3',
    ['a surrogate', refuse([frame(TEXT, SURROGATE)], WHOLE, 1007)],
    ['a surrogate, cut at every byte',
        refuse(fragments(TEXT, SURROGATE, 1), WHOLE, 1007)]);
section('6.4',
    ['the second of three frames is wrong', failFast(asFrames(11, 15))],
    ['its wrong byte ends the frame', failFast(asFrames(12, 13))],
    ['the second of three chops of a frame is wrong',
        failFast(asOneFrame(11, 15))],
    ['its wrong byte ends the chop', failFast(asOneFrame(12, 13))]);

const VALID = true, INVALID = false;
const hex = (list) => list.trim().split(/\s+/);
const range = (first, end, each) => Array.from({ length: end - first },
    (_, i) => each(first + i));
const byte = (value) => value.toString(16).padStart(2, '0');
const truncated = hex('c0 e080 f08080 f8808080 fc80808080 ' +
    'df efbf f7bfbf fbbfbfbf fdbfbfbfbf');
const around = (middle) => Buffer.concat([Buffer.from('hello'),
    Buffer.from(middle, 'hex'), Buffer.from('world')]).toString('hex');
const prefixes = range(1, KOSME.length + 1,
    (end) => KOSME.toString('hex', 0, end));
const nonCharacters = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    .flatMap((plane) => [0xfffe, 0xffff].map((low) => Buffer.from(
        String.fromCodePoint(plane * 65536 + low)).toString('hex')));
const utf8 = [      // [what, valid?, sequences, valid?, sequences …]
    ['correct text', VALID, [...hex('24 c2a2 e282ac f0a4ada2').map(around),
        KOSME.toString('hex')]],
    ['a prefix of correct text', ...prefixes.flatMap((p) =>
        [[2, 5, 7, 9, 11].includes(p.length / 2) ? VALID : INVALID, [p]])],
    ['first sequence of its length', VALID, hex('00 c280 e0a080 f0908080')],
    ['first of 5 or 6 bytes', INVALID, hex('f888808080 fc8480808080')],
    ['last sequence of its length', VALID, hex('7f dfbf efbfbf f48fbfbf')],
    ['last of 4, 5, 6 bytes', INVALID, hex('f7bfbfbf fbbfbfbfbf fdbfbfbfbfbf')],
    ['another border', VALID, hex('ed9fbf ee8080 efbfbd f48fbfbf'),
        INVALID, hex('f4908080')],
    ['unexpected continuation', INVALID, [...hex('80 bf'),
        ...range(2, 7, (n) => '80bf80bf80bf'.slice(0, 2 * n)),
        range(0x80, 0xbf, byte).join('')]],
    ['lonely start bytes', INVALID, [[0xc0, 0xdf], [0xe0, 0xef], [0xf0, 0xf7],
        [0xf8, 0xfb], [0xfc, 0xfd]].map(([first, last]) =>
        range(first, last, (b) => byte(b) + '20').join(''))],
    ['last continuation byte missing', INVALID, truncated],
    ['incomplete sequences joined', INVALID, [truncated.join('')]],
    ['impossible bytes', INVALID, hex('fe ff fefeffff')],
    ['overlong ASCII', INVALID, hex('c0af e080af f08080af f8808080af fc80808080af')],
    ['most overlong', INVALID, hex('c1bf e09fbf f08fbfbf f887bfbfbf fc83bfbfbfbf')],
    ['overlong NUL', INVALID, hex('c080 e08080 f0808080 f880808080 fc8080808080')],
    ['one surrogate', INVALID,
        hex('eda080 edadbf edae80 edafbf edb080 edbe80 edbfbf')],
    ['two surrogates', INVALID, ['eda080', 'edadbf', 'edae80', 'edafbf']
        .flatMap((high) => [high + 'edb080', high + 'edbfbf'])],
    ['a code point that is no character', VALID,
        [...hex('efbfbe efbfbf'), ...nonCharacters]],
    ['a special code point', VALID, range(0xb9, 0xc0, (b) => 'efbf' + byte(b))],
];
utf8.forEach(([what, ...rest], i) => section(`6.${5 + i}`,
    ...range(0, rest.length / 2, (n) => rest[2 * n + 1].map((sequence) => [
        `${what}: ${sequence}`, rest[2 * n] === VALID ?
            echo(TEXT, Buffer.from(sequence, 'hex')) :
            refuse([frame(TEXT, Buffer.from(sequence, 'hex'))], WHOLE, 1007),
    ])).flat()));

// 7: closing
const close = (code = 1000, reason) => frame(CLOSE, closePayload(code, reason));
const BIG = bytesOf('BAsd7&jh23', 256 * K);
section('7.1',
    ['a message, then a Close', echo(TEXT, HELLO)],
    ['two Closes', closing([close(), frame(CLOSE)], 1000)],
    ['a ping after the Close', closing([close(), frame(PING)], 1000)],
    ['a message after the Close', closing([close(), hello], 1000)],
    ['a Close within a message', closing([begin('one'), close(), finish('two')],
        1000)],
    ['256 KiB, a message, a Close, a ping', async (peer) => {
        // What comes back before the Close is left open, but not its order.
        peer.send(frame(TEXT, BIG), hello, close(), frame(PING));
        const { code, frames } = await peer.closed();
        assert.equal(code, 1000);
        const full = [[TEXT, BIG], [TEXT, HELLO]];
        assert.ok(frames.length <= 2);
        frames.forEach((f, i) => same(f, full[i]));
    }]);
section('7.3',
    ['an empty Close', closing([frame(CLOSE)], [1000, 1005])],
    ['a Close of one byte', closing([frame(CLOSE, 'a')], 1002)],
    ['a Close of two bytes', closing([close()], 1000)],
    ['a Close with a reason', closing([close(1000, HELLO)], 1000)],
    ['a Close with a reason of 123 bytes',
        closing([close(1000, bytesOf('*', 123))], 1000)],
    ['a Close with a reason of 124 bytes',
        closing([close(1000, bytesOf('*', 124))], 1002)]);
section('7.5', ['a reason that is not UTF-8', closing([close(1000, SURROGATE)],
    1007)]);
section('7.7', ...[1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000,
    3999, 4000, 4999].map((code) => [`the good code ${code}`,
    closing([close(code)], [1000, code])]));
section('7.9', ...[0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999].map(
    (code) => [`the bad code ${code}`, closing([close(code)], 1002)]));
section('7.13', ...[5000, 65535].map((code) => [`the code ${code}`,
    closing([close(code)], [1000, 1002, code])]));

// 9: limits and speed
const TEXT_FILL = 'BAsd7&jh23', BYTES_FILL = Buffer.from('00fe23faf0', 'hex');
const sized = (size) => (size < M ? `${size / K} KiB` : `${size / M} MiB`);
const big = (opcode, fill) => [64 * K, 256 * K, M, 4 * M, 8 * M, 16 * M].map(
    (size) => [sized(size), (peer) => echo(opcode, bytesOf(fill, size))(peer)]);
// The last fragment is empty: sizes are divisors, and it ends the message.
const fragmented = (opcode, fill) => range(0, 9, (i) => 64 * 4 ** i).map((size) =>
    [`4 MiB in fragments of ${size} bytes`, (peer) => {
        const data = bytesOf(fill, 4 * M);
        const parts = [...cut(data, size), ''];
        return exchange(fragments(opcode, null, parts, { mask: [1, 2, 3, 4] }),
            [[opcode, data]])(peer);
    }]);
const chopped = (opcode, fill) => range(0, 6, (i) => 64 * 2 ** i).map((chop) =>
    [`1 MiB in chops of ${chop} bytes`,
        (peer) => echo(opcode, bytesOf(fill, M), { chop })(peer)]);
const thousand = (opcode, fill) => [0, 16, 64, 256, 1024, 4096].map((size) =>
    [`1000 messages of ${size} bytes, one by one`, async (peer) => {
        const data = bytesOf(fill, size);
        for (let i = 0; i < 1000; i++) {
            peer.send(frame(opcode, data));
            same(await peer.next(), [opcode, data]);
        }
        peer.close(1000);
        ended(await peer.closed(), 1000);
    }]);
section('9.1', ...big(TEXT, TEXT_FILL));
section('9.2', ...big(BINARY, BYTES_FILL));
section('9.3', ...fragmented(TEXT, '*'));
section('9.4', ...fragmented(BINARY, Buffer.from([0xfe])));
section('9.5', ...chopped(TEXT, TEXT_FILL));
section('9.6', ...chopped(BINARY, BYTES_FILL));
section('9.7', ...thousand(TEXT, '*'));
section('9.8', ...thousand(BINARY, Buffer.from([0xfe])));

// 10: automatic fragmentation
section('10.1', ['65536 bytes in fragments of 1300',
    inFragments(bytesOf('*', 65536), 1300)]);

// ----- running them --------------------------------------------------------

test('there are 301 cases, each with a number of its own', () => {
    assert.equal(cases.length, 301);
    assert.equal(new Set(cases.map(([number]) => number)).size, 301);
});

test('the cases', { concurrency: 4 }, async (t) => {
    const server = await startServer(t, { args: ['--max-message', '16M'] });
    await Promise.all(cases.map(([number, what, run]) =>
        t.test(`${number} ${what}`, async () => {
            const peer = await server.connect(`/ws/case-${number}?echo=1`);
            try {
                await run(peer);
            } finally {
                peer.socket.destroy();
            }
        })));
});
