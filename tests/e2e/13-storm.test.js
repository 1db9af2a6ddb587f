// SPDX-License-Identifier: MIT
// Goal: 300 clients in 30 channels, under random joins, leaves, kills, stalls and
// bursts for 20 s, and not one message lost, doubled or out of order.
//
// Each connection numbers its messages. One member of each room never leaves,
// never stalls and hears everything (?echo=1): what it heard is the room's
// order. Of every sender it must have heard 0, 1, 2, … without a gap; what any
// other member heard must be a piece of that order without a hole, its own
// messages aside, from its join on, and to the end unless it left before.
//
// COLLABD_STORM_MS shortens it, COLLABD_STORM_SEED repeats one's dice.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { frame, OP } from './lib/raw.js';
import { SLOW, startServer } from './lib/server.js';

const CLIENTS = 300, ROOMS = 30;
const DURATION = Number(process.env.COLLABD_STORM_MS ?? 20000);
const SEED = Number(process.env.COLLABD_STORM_SEED ?? Date.now() % 2 ** 31);
const K = 1024;
const { TEXT, BINARY, CLOSE } = OP;
const SLOW_CLOSES = 'collabd_closes_total{reason="slow"}';

// Numbers in [0, 1) that depend on the seed alone (mulberry32).
function dice(seed) {
    return () => {
        seed = (seed + 0x6d2b79f5) | 0;
        let x = Math.imul(seed ^ (seed >>> 15), seed | 1);
        x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
        return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
    };
}

// ----- rooms and members ---------------------------------------------------

class Room {
    sent = [];          // 'sender number' of all that was sent, as it was sent
    members = [];       // all that ever joined
    bursting = false;

    constructor(name) {
        this.name = name;
    }
}

let senders = 0;

// A connection's whole life, and what it heard: keys 'sender number'.
class Member {
    id = senders++;
    heard = [];
    numbers = 0;        // sent so far
    leaving = false;    // we end it, or it stalled and may be cut
    stalled = false;
    close = null;       // code of the server's Close

    static async join(server, room, echo) {
        const m = new Member();
        Object.assign(m, { room, echo });
        room.members.push(m);
        m.peer = await server.connect(`/ws/${room.name}${echo ? '?echo=1' : ''}`);
        m.joined = room.sent.length;    // what follows in `sent` it must hear
        m.peer.onFrame = (f) => {
            if (f.opcode === CLOSE)
                m.close = f.code;
            else if (f.opcode === TEXT || f.opcode === BINARY)
                m.heard.push(m.read(f));
        };
        return m;
    }

    get alive() {
        return this.peer && !this.leaving && !this.peer.how && this.close === null;
    }

    // A message says who sent it, its number and its size.
    say(size, binary) {
        const key = `${this.id} ${this.numbers++}`;
        this.room.sent.push(key);
        return this.peer.send(frame(binary ? BINARY : TEXT,
            `${key} ${size} `.padEnd(size, '.')));
    }

    read(f) {
        const [id, number, size] = f.data.toString('latin1', 0, 40).split(' ');
        assert.ok(f.data.length >= Number(size), `${id} ${number} was cut short`);
        return `${id} ${number}`;
    }
}

// ----- the storm -----------------------------------------------------------

function size(random) {
    const x = random();
    const most = x < 0.8 ? 200 : x < 0.96 ? 4 * K : x < 0.999 ? 20 * K : 200 * K;
    return 20 + Math.floor(random() * most);
}

const actions = {
    async say(m, random) {
        if (m.alive)
            m.say(size(random), random() < 0.3);
    },
    // About 100 KiB at once: less than a ring, so who reads keeps up.
    async burst(m) {
        if (!m.alive || m.room.bursting)
            return;
        m.room.bursting = true;
        await Promise.all(Array.from({ length: 25 }, () => m.alive && m.say(4 * K)));
        await setTimeout(100);
        m.room.bursting = false;
    },
    async stall(m, random) {
        if (!m.alive || m.stalled)
            return;
        m.stalled = true;
        m.peer.pause();
        await setTimeout(100 + random() * 3000);
        m.peer.resume();
    },
    async leave(m) {
        m.leaving = true;
        m.peer.close(1000);
    },
    async vanish(m) {
        m.leaving = true;
        m.peer.end();
    },
    async kill(m) {
        m.leaving = true;
        m.peer.reset();
    },
    async killInMidFrame(m) {
        m.leaving = true;
        await m.peer.send(frame(TEXT, 'x'.repeat(1000)).subarray(0, 500));
        m.peer.reset();
    },
};

function choose(random) {
    const x = random();
    return x < 0.95 ? 'say' : x < 0.96 ? 'burst' : x < 0.98 ? 'stall' :
        x < 0.987 ? 'leave' : x < 0.991 ? 'vanish' : x < 0.996 ? 'kill' :
            'killInMidFrame';
}

// Lets one of the room's members, the observer aside, do something every now
// and then, and keeps the room's number of members up.
async function weather(server, room, random, until) {
    const running = [];
    while (Date.now() < until) {
        const mayLeave = room.members.slice(1).filter((m) => m.alive);
        if (mayLeave.length < CLIENTS / ROOMS - 1) {
            await Member.join(server, room, random() < 0.3);
        } else {
            const m = mayLeave[Math.floor(random() * mayLeave.length)];
            running.push(actions[choose(random)](m, random));
        }
        await setTimeout(random() * 30 * SLOW);
    }
    await Promise.all(running);
}

// ----- what must be true of it ---------------------------------------------

const owner = (key) => Number(key.split(' ')[0]);

// Waits until everyone alive has heard a last message of everyone alive.
async function settle(rooms) {
    for (const room of rooms) {
        const alive = room.members.filter((m) => m.alive);
        const last = alive.map((m) => (m.say(30), `${m.id} ${m.numbers - 1}`));
        for (const m of alive)
            m.missing = () => last.filter((key) => m.alive &&
                !m.heard.slice(-1000).includes(key) &&
                (m.echo || owner(key) !== m.id));
    }
    const waiting = rooms.flatMap((room) => room.members).filter((m) => m.missing);
    for (const end = Date.now() + 15000 * SLOW; ; await setTimeout(50)) {
        const behind = waiting.filter((m) => m.missing().length);
        if (!behind.length)
            return;
        assert.ok(Date.now() < end, `${behind.length} members did not hear all; ` +
            `one misses ${behind[0].missing()}`);
    }
}

function check(room) {
    const [observer, ...others] = room.members;
    const place = new Map(observer.heard.map((key, i) => [key, i]));
    const next = new Map();
    for (const key of observer.heard) {
        const [id, number] = key.split(' ').map(Number);
        assert.equal(number, next.get(id) ?? 0, `sender ${id}: loss or order`);
        next.set(id, number + 1);
    }
    for (const m of room.members.filter((m) => m.alive))
        assert.equal(next.get(m.id), m.numbers, `not all of ${m.id} was relayed`);
    // a clean leave loses nothing either
    others.filter((m) => m.peer.how === 'fin' && m.leaving && !m.stalled)
        .forEach((m) => assert.equal(next.get(m.id) ?? 0, m.numbers,
            `not all of ${m.id} was relayed before it left`));

    for (const m of others.filter((m) => m.heard.length)) {
        const first = place.get(m.heard[0]);
        const foreign = (key) => m.echo || owner(key) !== m.id;
        const order = observer.heard.slice(first, place.get(m.heard.at(-1)) + 1)
            .filter(foreign);
        assert.deepEqual(m.heard, order, `member ${m.id} of ${room.name}`);
        const due = Math.min(...room.sent.slice(m.joined).filter(foreign)
            .map((key) => place.get(key) ?? Infinity));
        assert.ok(first <= due, `member ${m.id} missed what followed its join`);
        if (m.alive)
            assert.equal(observer.heard.slice(place.get(m.heard.at(-1)) + 1)
                .filter(foreign).length, 0, `member ${m.id} missed the end`);
    }
}

test(`a storm loses, doubles and reorders nothing (seed ${SEED})`, async (t) => {
    t.diagnostic(`COLLABD_STORM_SEED=${SEED}`);
    const random = dice(SEED);
    const server = await startServer(t, {
        args: ['--max-clients', String(CLIENTS + 100), '--max-rooms', String(ROOMS)] });
    const none = (await server.metrics()).collabd_clients;
    const rooms = Array.from({ length: ROOMS }, (_, i) => new Room(`storm-${i}`));
    await Promise.all(rooms.map((room) => Member.join(server, room, true)));

    const until = Date.now() + DURATION;
    await Promise.all(rooms.map((room) =>
        weather(server, room, dice(random() * 2 ** 31), until)));
    await setTimeout(300 * SLOW);
    await settle(rooms);
    rooms.forEach(check);

    const members = rooms.flatMap((room) => room.members);
    const cut = members.filter((m) => !m.leaving && !m.alive);
    const alive = members.filter((m) => m.alive);
    t.diagnostic(`${members.length} connections, ${alive.length} to the end, ` +
        `${cut.length} cut, ${rooms.reduce((n, r) => n + r.sent.length, 0)} sent, ` +
        `${members.reduce((n, m) => n + m.heard.length, 0)} heard`);
    for (const m of cut) {
        assert.ok(m.stalled, `${m.id} never stalled and was cut (${m.close})`);
        assert.ok(m.close === null || m.close === 1013, `closed with ${m.close}`);
    }
    assert.ok(members.every((m) => !m.leaving || m.close === null ||
        [1000, 1013].includes(m.close)));
    await server.waitForMetric('collabd_clients', none + alive.length);
    const slow = (await server.metrics())[SLOW_CLOSES];
    assert.ok(slow >= cut.length, `${slow} counted, ${cut.length} cut`);
});
