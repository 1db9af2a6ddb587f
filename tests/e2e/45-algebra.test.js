// SPDX-License-Identifier: MIT
// Goal: what the sync codec makes of updates without building a document is what
// Yjs itself makes of them. Random documents of every shared type are edited by
// several clients whose updates come late, twice, in any order or not at all,
// while stores that merge, clean and compact at random moments take them in.
// Whoever is fed from a store, from the beginning or from any point in between,
// must end up with what the others have.
//
// The codec runs behind a pipe (tests/unit/ytool.c). Each run has a number, and
// every failure names it: COLLABD_SEED=n runs that one first. COLLABD_SECONDS
// says how long each of the random tests goes on (default 7).

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import * as Y from 'yjs';

const TOP = fileURLToPath(new URL('../..', import.meta.url));
const SECONDS = Number(process.env.COLLABD_SECONDS ?? 7);
const SEED = Number(process.env.COLLABD_SEED ?? Date.now() % 1e6);
const MODES = { off: 0, auto: 1, full: 2 };
const NOTHING = Buffer.alloc(0);

// ----- the codec ---------------------------------------------------------------

class Tool {
    #waiting = [];
    #heard = NOTHING;

    constructor() {
        execFileSync('make', ['-s', '-C', TOP, 'build/unit/ytool']);
        this.child = spawn(`${TOP}/build/unit/ytool`, [],
            { stdio: ['pipe', 'pipe', 'inherit'] });
        this.child.stdout.on('data', (bytes) => this.#hear(bytes));
        this.child.on('exit', () => this.#waiting.forEach((w) =>
            w.no(new Error('the codec has ended'))));
        this.child.stdin.on('error', () => {});
    }

    #hear(bytes) {
        this.#heard = Buffer.concat([this.#heard, bytes]);
        while (this.#heard.length >= 5) {
            const end = 5 + this.#heard.readUInt32LE(1);
            if (this.#heard.length < end)
                return;
            this.#waiting.shift().yes({ bad: this.#heard[0] === 1,
                bytes: this.#heard.subarray(5, end) });
            this.#heard = this.#heard.subarray(end);
        }
    }

    ask(op, ...args) {
        const parts = [Buffer.from([op.charCodeAt(0), args.length])];
        for (const arg of args) {
            const len = Buffer.alloc(4);
            len.writeUInt32LE(arg.length);
            parts.push(len, arg);
        }
        this.child.stdin.write(Buffer.concat(parts));
        return new Promise((yes, no) => this.#waiting.push({ yes, no }));
    }

    async get(op, ...args) {
        const answer = await this.ask(op, ...args);
        assert.ok(!answer.bad, `${op}: ${answer.bytes}`);
        return answer.bytes;
    }

    check = async (update) => {
        const { bad, bytes } = await this.ask('c', update);
        return bad ? { fault: String(bytes) } : JSON.parse(bytes);
    };
    merge = (mode, s) => this.get('m', uint(MODES[mode]), s.snapshot, run(s.tail));
    diff = (s, sv) => this.get('d', s.snapshot, run(s.tail), sv);
    minus = (s, update) => this.get('n', s.snapshot, run(s.tail), update);
    stateVector = (s) => this.get('s', s.snapshot, run(s.tail));
    pieces = async (most, update) => unrun(await this.get('p', uint(most), update));
    joining = async (most, update) => unrun(await this.get('j', uint(most), update));
}

function uint(n) {
    const bytes = [];
    for (; n > 127; n = Math.floor(n / 128))
        bytes.push(128 | n % 128);
    return Buffer.from([...bytes, n]);
}

const run = (updates) => Buffer.concat(updates.flatMap((u) => [uint(u.length), u]));

function unrun(bytes) {
    const updates = [];
    for (let at = 0; at < bytes.length;) {
        let len = 0;
        for (let shift = 1; ; shift *= 128) {
            len += (bytes[at] & 127) * shift;
            if (bytes[at++] < 128)
                break;
        }
        updates.push(bytes.subarray(at, at += len));
    }
    return updates;
}

const store = (...tail) => ({ snapshot: NOTHING, tail });

let codec = null;
const tool = () => codec ??= new Tool();
after(async () => {
    if (codec === null)
        return;
    codec.child.stdin.end();
    const [code] = await once(codec.child, 'exit');
    assert.equal(code, 0);
});

// ----- chance -------------------------------------------------------------------

class Chance {
    constructor(seed) {
        this.state = Math.imul(seed, 2654435761) + 12345 | 0 || 1;
    }
    below(n) {
        this.state ^= this.state << 13;
        this.state ^= this.state >>> 17;
        this.state ^= this.state << 5;
        return Math.floor((this.state >>> 0) / 4294967296 * n);
    }
    is = (p) => this.below(1000) < p * 1000;
    of = (list) => list[this.below(list.length)];
}

// ----- what a document looks like -------------------------------------------------

const ROOTS = { text: 'getText', map: 'getMap', list: 'getArray', xml: 'getXmlFragment' };
const roots = (doc) => Object.entries(ROOTS).map(([name, get]) => doc[get](name));

function look(v) {
    if (v instanceof Y.Doc)
        return { doc: v.guid };
    if (v instanceof Y.XmlElement)
        return { element: v.nodeName, with: look(v.getAttributes()), in: v.toArray().map(look) };
    if (v instanceof Y.Text)
        return { text: v.toDelta().map((d) => [look(d.insert), look(d.attributes ?? {})]),
            with: look(v.getAttributes()) };
    if (v instanceof Y.Map)
        return { map: look(Object.fromEntries([...v.entries()])), hook: v.hookName };
    if (v instanceof Y.AbstractType)
        return { list: v.toArray().map(look) };
    if (v instanceof Uint8Array)
        return { bytes: [...v] };
    if (Array.isArray(v))
        return v.map(look);
    if (typeof v === 'bigint' || v === undefined || Object.is(v, -0))
        return { odd: Object.is(v, -0) ? '-0' : String(v) };
    if (v !== null && typeof v === 'object')
        return Object.fromEntries(Object.keys(v).sort().map((k) => [k, look(v[k])]));
    return v;
}

const content = (doc) => JSON.stringify(roots(doc).map(look));
const clocks = (sv) => JSON.stringify([...Y.decodeStateVector(sv)].sort((a, b) => a[0] - b[0]));
const pending = (doc) => doc.store.pendingStructs !== null || doc.store.pendingDs !== null;

function docOf(...updates) {
    const doc = new Y.Doc();
    roots(doc);
    updates.forEach((u) => Y.applyUpdate(doc, u, 'net'));
    return doc;
}

// ----- random edits ----------------------------------------------------------------

const WORDS = ['a', 'b', 'xyz', 'hello ', 'ä', '中文', '😀', '👨‍👩‍👧', '\uFEFF', '\n', 'é😀x'];

function someValue(r, depth = 0) {
    return r.of([
        () => r.below(100) - 50, () => r.below(1e6) / 7, () => r.of(WORDS), () => null,
        () => r.is(0.5), () => 2 ** 40 + r.below(9), () => -0, () => 0.5,
        () => [someValue(r, depth + 1), r.of(WORDS)].slice(0, depth < 3 ? 2 : 0),
        () => depth < 3 ? { k: someValue(r, depth + 1), [r.of(WORDS)]: 1 } : {},
    ])();
}

const mapValue = (r) => r.is(0.1) ? undefined : r.is(0.1) ? BigInt(r.below(1e9)) * -3n :
    r.is(0.1) ? new Uint8Array([r.below(256), 1, 2]) :
        r.is(0.05) ? new Y.Doc({ guid: `g${r.below(1000)}`, meta: { m: 1 } }) : someValue(r);

function someType(r) {
    return r.of([
        () => new Y.Text(r.of(WORDS)), () => new Y.Map([['k', someValue(r)]]),
        () => Y.Array.from([someValue(r), 2]), () => someXml(r),
        () => new Y.Map([['t', new Y.Text(r.of(WORDS))]]),
    ])();
}

function someXml(r) {
    if (r.is(0.4))
        return new Y.XmlText(r.of(WORDS));
    if (r.is(0.1))
        return new Y.XmlHook('hook');
    const e = new Y.XmlElement(r.of(['p', 'h1']));
    if (r.is(0.5))
        e.setAttribute('a', r.of(WORDS));
    if (r.is(0.5))
        e.insert(0, [new Y.XmlText(r.of(WORDS))]);
    return e;
}

// Every shared type of a document that can be reached.
function types(doc) {
    const found = roots(doc);
    for (let i = 0; i < found.length; i++) {
        const t = found[i];
        const inside = t instanceof Y.Map ? [...t.values()] :
            t instanceof Y.Text ? t.toDelta().map((d) => d.insert) : t.toArray();
        found.push(...inside.filter((v) => v instanceof Y.AbstractType));
    }
    return found;
}

// Positions in a text that are not inside a surrogate pair.
function borders(text) {
    const at = [0];
    for (const d of text.toDelta())
        for (const unit of typeof d.insert === 'string' ? d.insert : [''])
            at.push(at.at(-1) + (unit.length || 1));
    return at;
}

function editText(r, t) {
    const at = borders(t);
    const i = r.below(at.length), n = Math.min(at.length - 1 - i, 1 + r.below(5));
    const len = at[i + n] - at[i];
    switch (len > 0 ? r.below(9) : 0) {
    case 0: case 1: case 2:
        t.insert(at[i], r.of(WORDS) + r.of(WORDS));
        break;
    case 3: case 4:
        t.delete(at[i], len);
        break;
    case 5: case 6:
        t.format(at[i], len, { [r.of(['bold', 'link'])]: r.of([true, null, { u: 1 }]) });
        break;
    case 7:
        t.insertEmbed(at[i], r.of([{ img: 1 }, { x: 'ü' }, new Y.Map()]));
        break;
    default: // typing, with backspaces
        for (let k = 0, p = at[i]; k < 12; k++)
            if (r.is(0.2) && p > at[i])
                t.delete(--p, 1);
            else
                t.insert(p++, r.of(['a', 'b', ' ', 'ö']));
    }
}

function editMap(r, t) {
    const key = r.of(['a', 'b', 'ü']);
    if (r.is(0.2))
        t.delete(key);
    else
        t.set(key, t instanceof Y.XmlHook ? 'x' : r.is(0.3) ? someType(r) : mapValue(r));
}

function editList(r, t, make) {
    const i = r.below(t.length + 1);
    if (r.is(0.3) && i < t.length)
        t.delete(i, 1 + r.below(Math.min(3, t.length - i)));
    else
        t.insert(i, make());
}

function edit(r, doc) {
    const t = r.of(r.is(0.5) ? roots(doc) : types(doc));
    if (t instanceof Y.XmlElement && r.is(0.3))
        r.is(0.7) ? t.setAttribute('a', r.of(WORDS)) : t.removeAttribute('a');
    else if (t instanceof Y.Text)
        editText(r, t);
    else if (t instanceof Y.Map)
        editMap(r, t);
    else if (t instanceof Y.XmlFragment)
        editList(r, t, () => [someXml(r)]);
    else
        editList(r, t, () => r.is(0.3) ? [someType(r)] : [someValue(r), r.below(9)]);
}

// ----- clients and stores -------------------------------------------------------------

// Takes an update as the server does: what is new goes to the tail.
async function take(s, update) {
    const fresh = await tool().minus(s, update);
    if (fresh.length > 0)
        s.tail.push(fresh);
}

async function compact(s) {
    s.snapshot = await tool().merge(s.mode, s);
    s.tail = [];
}

class World {
    log = [];       // every update there was
    clients = [];   // { doc, inbox }
    old = [];       // states of clients from some time ago

    constructor(seed) {
        this.r = new Chance(seed);
        this.stores = Object.keys(MODES).map((mode) => ({ mode, ...store() }));
        this.outbox = [];
        this.compacting = this.r.of([0.01, 0.05, 0.3]);
        const ids = this.r.is(0.5) ? 1 : 2 ** 29 + 7;
        for (let n = 2 + this.r.below(3), i = 0; i < n; i++)
            this.join(new Y.Doc({ gc: this.r.is(0.85) }), ids * (i + 1));
    }

    join(doc, id) {
        const client = { doc, inbox: [] };
        doc.clientID = id;
        roots(doc);
        doc.on('update', (bytes, origin) => {
            if (origin === 'net')
                return;
            const update = Buffer.from(bytes);
            this.log.push(update);
            this.outbox.push(update);
            this.clients.forEach((c) => c !== client && c.inbox.push(update));
        });
        this.clients.push(client);
    }

    // Moves some updates, or all.
    async move(all) {
        const { r } = this;
        const next = (queue) => {
            const i = all || r.is(0.7) ? 0 : r.below(queue.length);
            return r.is(0.1) && !all ? queue[i] : queue.splice(i, 1)[0];
        };
        for (const { doc, inbox } of this.clients)
            while (inbox.length > 0 && (all || r.is(0.5)))
                Y.applyUpdate(doc, next(inbox), 'net');
        while (this.outbox.length > 0 && (all || r.is(0.6))) {
            const update = next(this.outbox);
            await Promise.all(this.stores.map((s) => take(s, update)));
            for (const s of this.stores)
                if (r.is(this.compacting))
                    await compact(s);
        }
    }

    // The handshake of a client that was away, with each store.
    async handshake({ doc }) {
        for (const s of this.stores) {
            await take(s, Buffer.from(Y.encodeStateAsUpdate(doc,
                await tool().stateVector(s))));
            Y.applyUpdate(doc, await tool().diff(s, Buffer.from(Y.encodeStateVector(doc))),
                'net');
        }
    }

    async play(steps) {
        const { r } = this;
        for (let i = 0; i < steps; i++) {
            const c = r.of(this.clients);
            c.doc.transact(() => {
                for (let n = 1 + r.below(3); n > 0; n--)
                    edit(r, c.doc);
            });
            if (this.old.length < 3 && r.is(0.05))
                this.old.push(Buffer.from(Y.encodeStateAsUpdate(c.doc)));
            await this.move(false);
            if (r.is(0.02))
                await this.handshake(r.of(this.clients));
        }
    }

    // Everybody gets everything; then all must be equal.
    async settle() {
        await this.move(true);
        for (let round = 0; round < 2; round++) // derived deletes need the second
            for (const c of this.clients)
                await this.handshake(c);
        await this.move(true);
        const [first] = this.clients;
        const want = content(first.doc), sv = clocks(Y.encodeStateVector(first.doc));
        for (const { doc } of this.clients) {
            assert.ok(!pending(doc), 'a client waits for something');
            assert.equal(content(doc), want, 'clients differ');
        }
        for (const s of this.stores)
            await this.judge(s, want, sv);
    }

    async judge(s, want, sv) {
        const { r } = this;
        const whole = await tool().merge(s.mode, s);
        assert.ok((await tool().check(whole)).canonical, `${s.mode}: not canonical`);
        assert.equal(clocks(await tool().stateVector(s)), sv, `${s.mode}: state vector`);
        const again = { snapshot: whole, tail: [] };
        assert.deepEqual(await tool().merge(s.mode, again), whole, `${s.mode}: merged twice`);
        assert.equal(clocks(await tool().stateVector(again)), sv);
        assert.equal((await tool().diff(again, Buffer.from(Y.encodeStateVector(
            this.clients[0].doc))))[0], 0, `${s.mode}: diff to its own state has structs`);
        // not piece by piece: Yjs tidies up the formats of half a document
        const pieces = await tool().pieces(80 + r.below(2000), whole);
        assert.deepEqual(await tool().merge('off', store(...pieces)), whole);
        const fresh = [docOf(whole), docOf(Y.mergeUpdates(pieces))];
        for (const old of this.old) {
            const doc = docOf(old);
            Y.applyUpdate(doc, await tool().diff(s, Buffer.from(Y.encodeStateVector(doc))),
                'net');
            fresh.push(doc);
        }
        for (const doc of fresh) {
            assert.ok(!pending(doc), `${s.mode}: something is missing`);
            assert.equal(content(doc), want, `${s.mode}: another content`);
        }
        for (const update of this.log.filter(() => r.is(0.05)))
            assert.equal((await tool().minus(s, update)).length, 0, `${s.mode}: still new`);
    }
}

// Runs `body` with one number after the other until the time is over.
async function runs(t, body) {
    const end = Date.now() + SECONDS * 1000;
    let n = SEED;
    do {
        try {
            await body(n);
        } catch (error) {
            t.diagnostic(`failed with COLLABD_SEED=${n}`);
            throw error;
        }
        n++;
    } while (Date.now() < end);
    t.diagnostic(`${n - SEED} runs from seed ${SEED}`);
}

const timed = { timeout: (SECONDS + 60) * 1000 };

// ----- tests ---------------------------------------------------------------------------

test('clients and stores of every mode converge, whatever comes when', timed, async (t) => {
    await runs(t, async (seed) => {
        const world = new World(seed);
        await world.play(15 + world.r.below(60));
        await world.settle();
        // those who come back with an old state edit on top of compacted stores
        for (const s of world.stores)
            await compact(s);
        world.old.forEach((old, i) => world.join(docOf(old), 3e9 + i));
        world.join(docOf(world.stores[1].snapshot), 3.5e9);
        world.join(docOf(world.stores[2].snapshot), 3.6e9);
        await world.play(20);
        await world.settle();
    });
});

test('a merge, a state vector and a diff say what those of Yjs say', timed, async (t) => {
    await runs(t, async (seed) => {
        const world = new World(seed), { r } = world;
        await world.play(10 + r.below(40));
        const some = world.log.filter(() => r.is(0.6));
        if (some.length === 0)
            return;
        const theirs = Y.mergeUpdates(some);
        const ours = await tool().merge('off', store(...some));
        assert.equal(content(docOf(ours)), content(docOf(theirs)));
        assert.equal(clocks(await tool().stateVector(store(...some))),
            clocks(Y.encodeStateVectorFromUpdate(theirs)));
        assert.ok(ours.length <= theirs.length);
        // a client that has some of it gets the rest, from either
        const part = () => docOf(...some.slice(0, r.below(some.length)));
        const one = part(), sv = Buffer.from(Y.encodeStateVector(one));
        const two = docOf(Buffer.from(Y.encodeStateAsUpdate(one)));
        Y.applyUpdate(one, await tool().diff(store(...some), sv));
        Y.applyUpdate(two, Y.diffUpdate(theirs, sv));
        assert.equal(content(one), content(two));
        // what is cut off a merge and put back makes the same merge
        const half = store(...some.filter(() => r.is(0.5)));
        const rest = await tool().minus(half, ours);
        half.tail.push(...rest.length > 0 ? [rest] : []);
        assert.equal((await tool().minus(half, ours)).length, 0);
        assert.deepEqual(await tool().merge('off', half), ours);
        // in any order
        const shuffled = some.map((u) => [r.below(1e6), u]).sort((a, b) => a[0] - b[0]);
        assert.deepEqual(await tool().merge('off', store(...shuffled.map((p) => p[1]))), ours);
    });
});

test('a client that joins by pieces acts on nothing before the last', timed, async (t) => {
    await runs(t, async (seed) => {
        const world = new World(seed), { r } = world;
        await world.play(20 + r.below(60));
        await world.settle();
        const whole = await tool().merge(r.of(Object.keys(MODES)), world.stores[0]);
        const pieces = await tool().joining(60 + r.below(3000), whole);
        const doc = docOf();
        let heard = 0;
        doc.on('update', () => heard++);
        doc.on('afterTransaction', (tr) => { heard += tr.changed.size > 0; });
        for (const piece of pieces.slice(0, -1)) {
            assert.ok((await tool().check(piece)).canonical);
            Y.applyUpdate(doc, piece, 'net');
        }
        assert.equal(heard, 0, 'it acted on half a document');
        Y.applyUpdate(doc, pieces.at(-1), 'net');
        assert.ok(!pending(doc));
        assert.equal(content(doc), content(world.clients[0].doc));
    });
});

test('what is accepted never makes a client stumble', timed, async (t) => {
    const { error, warn } = console;
    console.error = console.warn = () => {};
    t.after(() => Object.assign(console, { error, warn }));
    let accepted = 0;
    await runs(t, async (seed) => {
        const world = new World(seed), { r } = world;
        await world.play(6);
        const updates = [...world.log, Buffer.from(Y.mergeUpdates(world.log))];
        for (let i = 0; i < 300; i++) {
            let u = Buffer.from(r.of(updates));
            for (let n = 1 + r.below(3); n > 0; n--) {
                const at = r.below(u.length), b = r.of([r.below(256), 0, 1, 127, 128, 255]);
                u = Buffer.concat([u.subarray(0, at), r.of([[b], [b], [b], [], [b, u[at]]]),
                    u.subarray(at + 1)].map((x) => Buffer.from(x)));
            }
            if ((await tool().check(u)).fault)
                continue;
            accepted++;
            for (const bytes of [u, await tool().merge('off', store(u)),
                await tool().merge('full', store(u))])
                assert.doesNotThrow(() => docOf(bytes), `update ${u.toString('hex')}`);
        }
    });
    t.diagnostic(`${accepted} mutants accepted`);
});

test('what one client types is kept short', async () => {
    const doc = new Y.Doc(), text = doc.getText('text'), updates = [];
    doc.clientID = 3456789012;
    doc.on('update', (u) => updates.push(Buffer.from(u)));
    for (let i = 0; i < 3000; i++) {
        text.insert(text.length, 'abc d'[i % 5]);
        if (i % 4 === 3)
            text.delete(text.length - 2, 1);
    }
    text.delete(100, 1500);
    const off = await tool().merge('off', store(...updates));
    const auto = await tool().merge('auto', store(...updates));
    assert.ok(off.length < 40000 && auto.length < off.length / 2,
        `${off.length}, ${auto.length} bytes`);
    assert.equal(docOf(auto).getText('text').toString(), text.toString());
    assert.deepEqual(Y.encodeStateVector(docOf(auto)), Y.encodeStateVector(doc));
});
