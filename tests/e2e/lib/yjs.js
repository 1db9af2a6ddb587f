// SPDX-License-Identifier: MIT
// What the tests of documents share: messages of the y-websocket protocol as
// bytes, a raw client that speaks them one by one, stock providers, documents
// made by dice and their comparison.
//
//   const server = await startYjs(t, { args: ['--data', dir] });
//   const a = await YClient.open(server, 'notes');
//   await a.expect('step1');                   // what the server greets with
//   await a.send(say.update(typed('hello')));
//   const doc = await load(server, 'notes');   // as a newcomer gets it
//   const p = join(t, server, 'notes');        // a real WebsocketProvider
//
// COLLABD_REFERENCE=1 runs what can be run against the reference server.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import * as decoding from 'lib0/decoding';
import * as encoding from 'lib0/encoding';
import WebSocket from 'ws';
import { WebsocketProvider } from 'y-websocket';
import * as Y from 'yjs';
import { connect, frame, handshake, OP } from './raw.js';
import { SLOW, startServer } from './server.js';

process.setMaxListeners(0);     // each provider listens for our exit

export const REFERENCE = Boolean(process.env.COLLABD_REFERENCE);
export const ours = { skip: REFERENCE && 'the reference server does not do this' };

// Names in /metrics that tests of documents look at.
export const METRIC = {
    open: 'collabd_documents',
    updates: 'collabd_doc_updates_total',
    known: 'collabd_doc_known_total',
    refused: 'collabd_doc_refused_total',
    merges: 'collabd_doc_merges_total',
    compactions: 'collabd_doc_compactions_total',
    bytes: 'collabd_journal_bytes_total',
    commits: 'collabd_journal_commits_total',
    syncs: 'collabd_journal_syncs_total',
};

// ----- servers -------------------------------------------------------------

const servers = new WeakMap();      // a test's own

export async function startYjs(t, opt = {}) {
    if (!REFERENCE) {
        const started = await startServer(t, opt);
        servers.set(t, [...(servers.get(t) ?? []), started]);
        return started;
    }
    const child = spawn(process.execPath,
        [fileURLToPath(new URL('reference.js', import.meta.url)),
            opt.listen?.split(':')[1] ?? '0'],
        { stdio: ['ignore', 'pipe', 'ignore'] });
    const server = new Reference(child);
    t.after(() => server.stop());
    await new Promise((resolve, reject) => {
        child.stdout.once('data', (line) => {
            server.port = Number(/\d+/.exec(line)[0]);
            server.url = `ws://127.0.0.1:${server.port}`;
            resolve();
        });
        child.once('close', () => reject(new Error('no reference server')));
    });
    return server;
}

class Reference {
    sockets = new Set();

    constructor(child) {
        this.child = child;
        this.gone = new Promise((resolve) => child.once('close', resolve));
    }
    connect(where, opt) {
        return connect(this, where, opt);
    }
    handshake(where, opt) {
        return handshake(this, where, opt);
    }
    async stop() {
        this.sockets.forEach((socket) => socket.destroy());
        this.child.kill('SIGKILL');
        await this.gone;
    }
    kill() {
        return this.stop();
    }
}

// A folder for --data. It goes when the test's servers have left it.
export function dataFolder(t) {
    const dir = mkdtempSync(path.join(os.tmpdir(), 'collabd-'));
    afterServers(t, () => rmSync(dir, { recursive: true, force: true }));
    return dir;
}

export function afterServers(t, act) {
    t.after(async () => {
        await Promise.allSettled((servers.get(t) ?? []).map((s) => s.stop()));
        act();
    });
}

// A port that is free now, for a server that comes back at the same address.
export async function freePort() {
    const probe = net.createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => probe.once('listening', resolve));
    const { port } = probe.address();
    await new Promise((resolve) => probe.close(resolve));
    return port;
}

// Polls until `what` gives something true, and gives it.
export async function until(what, ms = 5000 * SLOW, message = String(what)) {
    for (const end = Date.now() + ms; ; await pause(10)) {
        const value = await what();
        if (value)
            return value;
        if (Date.now() >= end)
            assert.fail(`not within ${ms} ms: ` +
                (typeof message === 'function' ? message() : message));
    }
}

// ----- bytes ---------------------------------------------------------------

export const uint = (n) =>
    [...encoding.encode((e) => encoding.writeVarUint(e, n))];
export const str = (text) =>
    [...encoding.encode((e) => encoding.writeVarString(e, text))];
export const flat = (...parts) => Buffer.from(parts.flat(Infinity));
export const EMPTY = Buffer.from([0, 0]);       // an update without content

const withLength = (data) => Buffer.concat([flat(uint(data.length)), data]);
const sync = (kind, data) =>
    Buffer.concat([flat(0, kind), withLength(Buffer.from(data))]);

// Messages of a client. An awareness entry is [client, clock, state]; a state
// that is a string goes out as it is, right or wrong.
export const say = {
    step1: (vector = [0]) => sync(0, vector),
    step2: (update = EMPTY) => sync(1, update),
    update: (update) => sync(2, update),
    awareness: (...entries) => Buffer.concat([flat(1), withLength(flat(
        uint(entries.length), entries.map(([client, clock, state]) =>
            [uint(client), uint(clock), str(typeof state === 'string' ? state :
                JSON.stringify(state))])))]),
    query: () => flat(3),
};

// A server's message as { kind, … }; it must fill its frame exactly.
export function hear(data) {
    const d = decoding.createDecoder(data);
    const message = hearers[decoding.readVarUint(d)]?.(d);
    assert.ok(message, `the server said ${data.toString('hex', 0, 40)}`);
    assert.ok(!decoding.hasContent(d), `more than one message in a frame, ` +
        `after ${message.kind}: ${data.toString('hex', d.pos, d.pos + 40)}`);
    return message;
}

const hearers = {
    0: (d) => {
        const kind = ['step1', 'step2', 'update'][decoding.readVarUint(d)];
        const data = Buffer.from(decoding.readVarUint8Array(d));
        assert.ok(kind, 'the server sent a sync message of no known kind');
        return kind === 'step1' ? { kind, vector: vectorOf(data), data } :
            { kind, update: data };
    },
    1: (d) => {
        const inner = decoding.createDecoder(decoding.readVarUint8Array(d));
        const read = () => [decoding.readVarUint(inner),
            decoding.readVarUint(inner), JSON.parse(decoding.readVarString(inner))];
        const entries = Array.from({ length: decoding.readVarUint(inner) }, read);
        assert.ok(!decoding.hasContent(inner), 'awareness with more than it says');
        return { kind: 'awareness', entries };
    },
    2: (d) => ({ kind: ['denied'][decoding.readVarUint(d)],
        reason: decoding.readVarString(d) }),
};

export const vectorOf = (data) => Object.fromEntries(Y.decodeStateVector(data));
const keepalive = (m) => m.kind === 'awareness' && m.entries.length === 0;

// ----- a raw client --------------------------------------------------------

export class YClient {
    #heard = [];        // taken from the socket, not yet by next()
    #pongs = new Map();
    keepalives = 0;

    // `where`: the document's name as it stands in the address, or a path.
    static async open(server, where, opt) {
        const client = new YClient(await server.connect(
            where.startsWith('/') ? where : `/yjs/${where}`, opt));
        return client;
    }

    // The same, and it is a member: greeted, and given what there is.
    static async enter(server, where, opt) {
        const client = await YClient.open(server, where, opt);
        client.vector = (await client.expect('step1')).vector;
        client.update = await client.ask();
        return client;
    }

    constructor(peer) {
        this.peer = peer;
        peer.onFrame = (f) => {
            if (f.opcode === OP.PONG)
                this.#pongs.get(f.text)?.();
            else
                peer.frames.push(f);
        };
    }

    send(...messages) {
        return this.peer.send(messages.map((m) => frame(OP.BINARY, m)));
    }

    // Waits until the server has taken in all that was sent so far.
    async settled(ms = 10000 * SLOW) {
        const name = `settled ${Math.random()}`;
        let done = false;
        const pong = new Promise((resolve) => this.#pongs.set(name, () =>
            resolve(done = true)));
        await this.peer.ping(name);
        await Promise.race([pong, until(() => done || this.gone, ms, 'a Pong')]);
        this.#pongs.delete(name);
        assert.ok(done, 'the stream ended');
    }

    async #pull(ms) {
        for (const end = Date.now() + ms; ;) {
            const { opcode, data } =
                await this.peer.message(Math.max(0, end - Date.now()));
            assert.equal(opcode, OP.BINARY, 'the server sent text');
            const message = hear(data);
            if (!keepalive(message))
                return message;
            this.keepalives++;
        }
    }

    // The next message; keepalives are counted and passed over.
    async next(ms = 5000 * SLOW) {
        return this.#heard.shift() ?? this.#pull(ms);
    }

    // The next message, which must be of that kind.
    async expect(kind, ms) {
        const message = await this.next(ms);
        assert.equal(message.kind, kind, JSON.stringify(message).slice(0, 400));
        return message;
    }

    // The next message of that kind; what comes before it stays in line.
    async take(kind, ms = 5000 * SLOW) {
        const at = this.#heard.findIndex((m) => m.kind === kind);
        if (at >= 0)
            return this.#heard.splice(at, 1)[0];
        for (const end = Date.now() + ms; ;) {
            const message = await this.#pull(Math.max(0, end - Date.now()));
            if (message.kind === kind)
                return message;
            this.#heard.push(message);
        }
    }

    // Everything that has come so far, without waiting.
    drain() {
        const got = this.peer.frames.splice(0);
        const close = got.find((f) => f.opcode === OP.CLOSE);
        assert.equal(close && `${close.code} ${close.reason}`, undefined);
        return [...this.#heard.splice(0), ...got.filter((f) => f.opcode < 8)
            .map((f) => hear(f.data))].filter((m) => !keepalive(m));
    }

    // Asserts that nothing (but keepalives) comes for a while.
    async silent(ms = 100 * SLOW) {
        await pause(ms);
        assert.deepEqual(this.drain().map((m) => JSON.stringify(m)), []);
        assert.equal(this.peer.how, null, 'the stream ended');
    }

    // What a SyncStep1 with that state vector brings.
    async ask(vector, ms) {
        await this.send(say.step1(vector));
        return (await this.take('step2', ms)).update;
    }

    // Waits until the server has all of `doc`, and answers when it asks for it, as
    // it does after it had to refuse something.
    async delivered(doc, ms = 20000 * SLOW) {
        for (const end = Date.now() + ms; ; await pause(50)) {
            const asked = this.drain().find((m) => m.kind === 'step1');
            if (asked)
                await this.send(say.step2(Y.encodeStateAsUpdate(doc, asked.data)));
            const has = Y.encodeStateVectorFromUpdate(await this.ask());
            if (Buffer.compare(has, Y.encodeStateVector(doc)) === 0)
                return;
            assert.ok(Date.now() < end, 'it was refused for good');
        }
    }

    // Puts all that comes until the answer to a SyncStep1 into `doc`.
    async load(doc = new Y.Doc(), ms = 20000 * SLOW) {
        await this.send(say.step1(Y.encodeStateVector(doc)));
        for (;;) {
            const { kind, update } = await this.next(ms);
            if (update)
                Y.applyUpdate(doc, update, 'net');
            if (kind === 'step2')
                return doc;
        }
    }

    // Waits for the end: { code, reason, heard }.
    async closed(ms) {
        const { code, reason, frames } = await this.peer.closed(ms);
        return { code, reason, heard: [...this.#heard.splice(0),
            ...frames.filter((f) => f.opcode < 8).map((f) => hear(f.data))] };
    }

    async leave() {
        if (!this.peer.how) {
            await this.peer.close(1000);
            await this.peer.closed();
        }
    }

    get gone() {
        return this.peer.how !== null;
    }
}

// A document as a newcomer gets it.
export async function load(server, where, opt) {
    const client = await YClient.open(server, where, opt);
    const doc = await client.load();
    await client.leave();
    return doc;
}

// ----- small updates -------------------------------------------------------

// Collects the updates that `edit` makes of a document.
export function updatesOf(doc, edit) {
    const made = [];
    const note = (update) => made.push(Buffer.from(update));
    doc.on('update', note);
    edit(doc);
    doc.off('update', note);
    return made;
}

let clients = 1000;
export const newClient = () => ++clients;

export function newDoc(client = newClient(), opt) {
    const doc = new Y.Doc(opt);
    doc.clientID = client;
    return doc;
}

// An update by a new client: `text` at the start of the root "text".
export const typed = (text, client) =>
    updatesOf(newDoc(client), (doc) => doc.getText('text').insert(0, text))[0];

export const textOf = (doc) => doc.getText('text').toString();

// ----- stock providers -----------------------------------------------------

// A WebsocketProvider that goes with the test; `connects` counts.
export function join(t, server, name, opt = {}) {
    const doc = opt.doc ?? new Y.Doc({ gc: opt.gc ?? true });
    const base = opt.base ?? `ws://127.0.0.1:${server.port}/yjs`;
    const provider = new WebsocketProvider(base, name, doc, {
        WebSocketPolyfill: WebSocket, disableBc: true, connect: false, ...opt });
    provider.connects = 0;
    provider.on('status', ({ status }) => {
        provider.connects += status === 'connected' ? 1 : 0;
    });
    provider.text = doc.getText('text');
    provider.leave = () => {
        provider.destroy();
        provider.awareness.destroy();
        doc.destroy();
    };
    t.after(provider.leave);
    if (opt.connect !== false)
        provider.connect();
    return provider;
}

export const synced = (provider, ms) => until(() => provider.synced, ms,
    () => `synced (${provider.connects} connects, socket in state ` +
        `${provider.ws?.readyState}, connected: ${provider.wsconnected})`);

// Waits until all (providers or documents) have the same in them.
export async function converged(all, ms = 10000 * SLOW) {
    const docs = all.map((x) => x.doc instanceof Y.Doc ? x.doc : x);
    const same = () => {
        const seen = docs.map(vectorText);
        return seen.every((v) => v === seen[0]) && docs.every(complete) &&
            docs.map(dump).every((d, _, [first]) => d === first);
    };
    await until(same, ms, () => docs.map((doc) => `${vectorText(doc)} ` +
        `${complete(doc) ? '' : 'pending '}${dump(doc)}`.slice(0, 2000)).join('\n'))
        .catch((error) => {
            throw Object.assign(error, { docs });
        });
}

// ----- documents compared --------------------------------------------------

export const ROOTS = { text: 'getText', map: 'getMap', list: 'getArray',
    xml: 'getXmlFragment' };

export const vectorText = (doc) => JSON.stringify([...Y.decodeStateVector(
    Y.encodeStateVector(doc))].sort((a, b) => a[0] - b[0]));
export const complete = (doc) =>
    !doc.store.pendingStructs && !doc.store.pendingDs;

const byKey = (object) => Object.fromEntries(Object.keys(object).sort()
    .map((key) => [key, plain(object[key])]));

function plain(value) {
    if (value instanceof Y.XmlElement)
        return { element: value.nodeName, with: byKey(value.getAttributes()),
            of: value.toArray().map(plain) };
    if (value instanceof Y.Text)
        return { text: value.toDelta().map(({ insert, attributes = {} }) =>
            [plain(insert), byKey(attributes)]), with: byKey(value.getAttributes()) };
    if (value instanceof Y.Map)
        return { map: byKey(Object.fromEntries(value.entries())) };
    if (value instanceof Y.AbstractType)
        return { list: value.toArray().map(plain) };
    if (value instanceof Y.Doc)
        return { document: value.guid };
    if (value instanceof Uint8Array)
        return { bytes: [...value] };
    if (Array.isArray(value))
        return value.map(plain);
    if (value && typeof value === 'object')
        return byKey(value);
    return Object.is(value, -0) ? '-0' : typeof value === 'bigint' ?
        { bigint: `${value}` } : value === undefined ? { none: 1 } : value;
}

// All that a document shows, as text that is equal when it shows the same.
export const dump = (doc) => JSON.stringify(Object.fromEntries(
    Object.entries(ROOTS).map(([name, get]) => [name, plain(doc[get](name))])));

// Do documents hold the very same units, with the same neighbours at birth and
// the same ones deleted? Then whoever carried them did no harm, and if they show
// them in another order it is because Yjs does: what UndoManager brings back now
// and then has neighbours in an order that nobody saw, and its place depends on
// what came first.
export function sameUnits(docs) {
    const units = (doc) => [...doc.store.clients.values()].flat().flatMap((s) =>
        Array.from({ length: s.length }, (_, i) => {
            const vague = !(s instanceof Y.Item);
            const last = i ? { client: s.id.client, clock: s.id.clock + i - 1 } :
                s.origin;
            return [`${s.id.client}.${s.id.clock + i}`, vague ? null :
                JSON.stringify([last, s.rightOrigin, s.content instanceof
                    Y.ContentFormat || s.deleted])];
        }));
    const [first, ...others] = docs.map((doc) => new Map(units(doc)));
    return others.every((other) => other.size === first.size &&
        [...first].every(([id, unit]) => other.has(id) && (other.get(id) === unit ||
            !other.get(id) || !unit)));
}

// ----- documents made by dice ----------------------------------------------

// Numbers in [0, 1) that depend on the seed alone (mulberry32).
export function dice(seed) {
    return () => {
        seed = (seed + 0x6d2b79f5) | 0;
        let x = Math.imul(seed ^ (seed >>> 15), seed | 1);
        x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
        return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
    };
}

const PIECES = ['a', 'b ', 'word ', 'ä', '中文', '😀', '👨‍👩‍👧', '\n', '𝒳', '\uFEFF'];

// Edits documents at random, all kinds of types and content in them.
export class Dice {
    bulk = 1;       // how long its words are

    constructor(seed) {
        this.random = dice(seed);
    }
    below(n) {
        return Math.floor(this.random() * n);
    }
    chance(p) {
        return this.random() < p;
    }
    pick(list) {
        return list[this.below(list.length)];
    }
    words() {
        return Array.from({ length: 1 + this.below(3) }, () =>
            this.pick(PIECES)).join('').repeat(this.bulk);
    }
    value(depth = 0) {
        const make = [() => this.below(100) - 50, () => this.random() * 1e9,
            () => this.words(), () => null, () => this.chance(0.5),
            () => 2 ** 40 + this.below(9), () => -0, () => 0.5,
            () => [this.value(depth + 1)],
            () => ({ k: this.value(depth + 1), [this.words()]: 1 })];
        return this.pick(depth > 2 ? make.slice(0, 8) : make)();
    }
    type() {
        return this.pick([() => new Y.Text(this.words()), () => new Y.Map(),
            () => Y.Array.from([this.value(), this.value()]),
            () => new Y.XmlElement('p'), () => this.xml()])();
    }
    xml(depth = 0) {
        if (this.chance(0.4))
            return new Y.XmlText(this.words());
        const element = new Y.XmlElement(this.pick(['p', 'h1', 'li']));
        if (this.chance(0.5))
            element.setAttribute(this.pick(['a', 'b']), this.words());
        if (depth < 3 && this.chance(0.6))
            element.insert(0, [this.xml(depth + 1)]);
        return element;
    }

    // All types of a document that are in use; roots come more often.
    types(doc) {
        const all = [];
        const walk = (type) => {
            all.push(type);
            const children = type instanceof Y.Map ? [...type.values()] :
                type instanceof Y.Text ? type.toDelta().map((d) => d.insert) :
                    type.toArray();
            children.filter((c) => c instanceof Y.AbstractType).forEach(walk);
        };
        Object.entries(ROOTS).forEach(([name, get]) => walk(doc[get](name)));
        return all;
    }

    // One edit; `undo` is an UndoManager or nothing.
    edit(doc, undo) {
        if (undo && this.chance(0.12))
            return this.chance(0.6) ? undo.undo() : undo.redo();
        const type = this.chance(0.5) ?
            (([name, get]) => doc[get](name))(this.pick(Object.entries(ROOTS))) :
            this.pick(this.types(doc));
        if (type instanceof Y.Text)
            return this.editText(type);
        if (type instanceof Y.Map)
            return this.editMap(type);
        if (type instanceof Y.XmlElement && this.chance(0.3))
            return this.chance(0.7) ?
                type.setAttribute(this.pick(['a', 'b']), this.words()) :
                type.removeAttribute(this.pick(['a', 'b']));
        return this.editList(type);
    }

    // A place in a text that does not cut a surrogate pair.
    place(type, at) {
        const units = type.toDelta().map(({ insert }) =>
            (typeof insert === 'string' ? insert : '*')).join('');
        return /[\uDC00-\uDFFF]/.test(units[at] ?? '') ? at - 1 : at;
    }
    range(type) {
        const from = this.place(type, this.below(type.length));
        const to = this.place(type, Math.min(type.length,
            from + 1 + this.below(8)));
        return [from, Math.max(0, to - from)];
    }

    editText(type) {
        const at = this.place(type, this.below(type.length + 1));
        const what = this.below(12);
        if (what < 4 || type.length === 0)
            type.insert(at, this.words());
        else if (what < 5)
            this.burst(type, at);
        else if (what < 8)
            type.delete(...this.range(type));
        else if (what < 10)
            type.format(...this.range(type), {
                [this.pick(['bold', 'em', 'link'])]: this.pick([true, null, 'x',
                    { href: 'ü' }]) });
        else if (what < 11)
            type.insertEmbed(at, this.pick([{ image: 1 }, { x: 'ü' }]),
                this.chance(0.3) ? { bold: true } : {});
        else
            type.insertEmbed(at, new Y.Map());
    }
    burst(type, at) {
        for (let n = 3 + this.below(12); n > 0; n--) {
            const piece = this.pick(['a', 'b', ' ', 'ö', '😀']);
            type.insert(at, piece);
            at += piece.length;
        }
    }
    editMap(type) {
        const key = this.pick(['a', 'b', 'c', 'ü']), what = this.below(10);
        if (what < 5)
            type.set(key, this.value());
        else if (what < 7)
            type.set(key, this.type());
        else if (what < 8)
            type.set(key, new Uint8Array([this.below(256), 1, 2]));
        else if (what < 9)
            type.set(key, new Y.Doc({ guid: `guid-${this.below(1000)}` }));
        else
            type.delete(key);
    }
    editList(type) {
        const at = this.below(type.length + 1), xml = type instanceof Y.XmlFragment;
        const what = this.below(10);
        if (what < 6 || type.length === 0)
            type.insert(at, [xml ? this.xml() : this.chance(0.3) ? this.type() :
                this.chance(0.1) ? new Y.Doc({ guid: `d${this.below(99)}` }) :
                    this.value()]);
        else
            type.delete(Math.min(at, type.length - 1), 1);
    }
}
