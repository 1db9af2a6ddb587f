// SPDX-License-Identifier: MIT
// A WebSocket client made of a bare socket: it can send every byte that a
// client may, or must not, send, and shows every byte and the kind of end that
// came back.
//
//   const peer = await connect(server, '/ws/room?echo=1');
//   peer.text('hello');                      // a proper masked frame
//   peer.send(frame(OP.TEXT, 'x', { mask: false, rsv: 4 }));     // not so
//   (await peer.message()).text;             // next whole message
//   (await peer.closed()).code;              // waits for the end of the stream

import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import net from 'node:net';
import tls from 'node:tls';
import { setImmediate, setTimeout } from 'node:timers/promises';

export const OP = { CONT: 0, TEXT: 1, BINARY: 2, CLOSE: 8, PING: 9, PONG: 10 };

// Sanitizer and valgrind builds are slow: COLLABD_SLOW=1 stretches all waiting.
export const SLOW = process.env.COLLABD_SLOW ? 6 : 1;
const PATIENCE = 5000 * SLOW;

const bytes = (x) => (typeof x === 'string' ? Buffer.from(x) : x);

// ----- frames out ----------------------------------------------------------

// One frame. By default right in every way; `fin`, `rsv` (0 to 7), `opcode` (0
// to 15), `mask` (false, or four bytes), `form` (7, 16, 64: the length's form
// even when not minimal) and `length` (announced instead of the payload's own)
// make it wrong.
export function frame(opcode, payload = '', opt = {}) {
    const data = bytes(payload);
    const { fin = true, rsv = 0, mask = crypto.randomBytes(4) } = opt;
    const length = opt.length ?? data.length;
    const form = opt.form ?? (length < 126 ? 7 : length < 65536 ? 16 : 64);
    const size = 2 + { 7: 0, 16: 2, 64: 8 }[form];
    const out = Buffer.alloc(size + (mask ? 4 : 0) + data.length);
    const marks = { 7: Number(length), 16: 126, 64: 127 };

    out[0] = (fin ? 0x80 : 0) | (rsv << 4) | opcode;
    out[1] = (mask ? 0x80 : 0) | marks[form];
    if (form === 16)
        out.writeUInt16BE(length, 2);
    if (form === 64)
        out.writeBigUInt64BE(BigInt(length), 2);
    if (!mask) {
        data.copy(out, size);
        return out;
    }
    Buffer.from(mask).copy(out, size);
    for (let i = 0, at = size + 4; i < data.length; i++)
        out[at + i] = data[i] ^ mask[i & 3];
    return out;
}

// One message in several frames: `pieces` is an array of payloads, or a number
// of bytes after which to cut.
export function fragments(opcode, payload, pieces, opt = {}) {
    const parts = Array.isArray(pieces) ? pieces : cut(bytes(payload), pieces);
    return parts.map((part, i) => frame(i ? OP.CONT : opcode, part,
        { ...opt, fin: i === parts.length - 1 }));
}

export function cut(data, size) {
    const parts = [];
    for (let at = 0; at < data.length; at += size)
        parts.push(data.subarray(at, at + size));
    return parts;
}

export function closePayload(code, reason = '') {
    const head = Buffer.alloc(2);
    head.writeUInt16BE(code);
    return Buffer.concat([head, bytes(reason)]);
}

// ----- frames in -----------------------------------------------------------

// Takes a server's stream in any pieces and gives its frames to `onFrame`.
// Throws at whatever a server must not send.
export class Decoder {
    #chunks = [];
    #have = 0;
    #need = 2;

    constructor(onFrame) {
        this.onFrame = onFrame;
    }

    push(chunk) {
        this.#chunks.push(chunk);
        this.#have += chunk.length;
        if (this.#have < this.#need)
            return;
        let data = this.#chunks.length > 1 ?
            Buffer.concat(this.#chunks) : this.#chunks[0];
        for (let used; (used = this.#take(data)) > 0;)
            data = data.subarray(used);
        this.#chunks = data.length ? [data] : [];
        this.#have = data.length;
    }

    get rest() {    // bytes of a frame that has only begun
        return this.#have;
    }

    #take(data) {
        const wait = (size) => (this.#need = size, 0);
        if (data.length < 2)
            return wait(2);
        let length = data[1] & 0x7f, at = 2;
        if (length === 126) {
            if (data.length < (at = 4))
                return wait(at);
            length = data.readUInt16BE(2);
            assert.ok(length > 125, 'the server sent a length not minimal');
        } else if (length === 127) {
            if (data.length < (at = 10))
                return wait(at);
            length = Number(data.readBigUInt64BE(2));
            assert.ok(length > 65535, 'the server sent a length not minimal');
        }
        const fin = data[0] >= 0x80, opcode = data[0] & 15;
        assert.equal(data[0] & 0x70, 0, 'the server set reserved bits');
        assert.ok(data[1] < 0x80, 'the server masked a frame');
        assert.ok([0, 1, 2, 8, 9, 10].includes(opcode),
            `the server sent opcode ${opcode}`);
        assert.ok(opcode < 8 || (fin && length < 126),
            'the server sent a control frame that is too long or not whole');
        if (data.length < at + length)
            return wait(at + length);
        this.onFrame(new Frame(fin, opcode, data.subarray(at, at + length)));
        return at + length;
    }
}

class Frame {
    constructor(fin, opcode, data) {
        Object.assign(this, { fin, opcode, data });
    }
    get text() {
        return this.data.toString();
    }
    get code() {    // of a Close
        return this.data.length ? this.data.readUInt16BE(0) : 1005;
    }
    get reason() {
        return this.data.subarray(2).toString();
    }
}

// ----- the opening handshake -----------------------------------------------

// A request head as text. `headers` are added to or replace the usual ones;
// null leaves one out, an array makes several lines.
export function upgradeRequest(path, opt = {}) {
    const { method = 'GET', version = 'HTTP/1.1', headers = {} } = opt;
    const all = {
        Host: 'localhost', Upgrade: 'websocket', Connection: 'Upgrade',
        'Sec-WebSocket-Key': opt.key ?? 'dGhlIHNhbXBsZSBub25jZQ==',
        'Sec-WebSocket-Version': '13', ...headers,
    };
    const lines = Object.entries(all).flatMap(([name, value]) =>
        (value === null ? [] : [value].flat().map((v) => `${name}: ${v}`)));
    return `${method} ${path} ${version}\r\n${lines.join('\r\n')}\r\n\r\n`;
}

export function acceptKey(key) {
    return crypto.createHash('sha1')
        .update(key + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest('base64');
}

// Opens a socket to `server` ({ port, host, path of a unix socket, tls: options
// for tls.connect }). The server's `sockets`, if it has them, learn of it.
export async function open(server, opt = {}) {
    const where = server.unix ? { path: server.unix } :
        { port: server.port, host: server.host ?? '127.0.0.1' };
    const options = { ...where, allowHalfOpen: true, ...opt };
    const socket = server.tls ? tls.connect({ ...options, ...server.tls }) :
        net.connect(options);
    server.sockets?.add(socket);
    socket.once('close', () => server.sockets?.delete(socket));
    await new Promise((resolve, reject) => {
        socket.once(server.tls ? 'secureConnect' : 'connect', resolve);
        socket.once('error', reject);
    });
    socket.on('error', () => {});
    socket.setNoDelay?.(true);
    return socket;
}

// Sends a request head (text, or options of upgradeRequest) and reads the
// answer's head: { status, headers (names in lower case), rest, socket }.
// `with` are bytes that go out in the same write as the head; `chop` cuts both
// into packets of so many bytes.
export async function handshake(server, path, opt = {}) {
    const socket = await open(server, opt.socket);
    const head = opt.head ?? upgradeRequest(path, opt);
    const data = Buffer.concat([bytes(head), bytes(opt.with ?? '')]);
    for (const part of cut(data, opt.chop ?? data.length)) {
        socket.write(part);
        await setImmediate();
    }

    let got = Buffer.alloc(0), end;
    const left = AbortSignal.timeout(opt.ms ?? PATIENCE);
    while ((end = got.indexOf('\r\n\r\n')) < 0) {
        const chunk = socket.read();
        if (chunk)
            got = Buffer.concat([got, chunk]);
        else if (socket.readableEnded || socket.destroyed || left.aborted)
            throw new Error(`no answer to the handshake, got "${got}"`);
        else
            await wake(socket, left);
    }
    const [first, ...lines] = got.toString('latin1', 0, end).split('\r\n');
    const headers = {};
    for (const line of lines) {
        const [, name, value] = line.match(/^([^:\s]+):\s*(.*?)\s*$/);
        const lower = name.toLowerCase();
        headers[lower] = headers[lower] ? `${headers[lower]}, ${value}` : value;
    }
    const status = Number(first.match(/^HTTP\/1\.1 (\d{3}) /)?.[1]);
    return { status, headers, socket, rest: got.subarray(end + 4) };
}

function wake(socket, signal) {
    return new Promise((resolve) => {
        const events = ['readable', 'end', 'close'];
        const done = () => {
            events.forEach((name) => socket.off(name, done));
            signal.removeEventListener('abort', done);
            resolve();
        };
        events.forEach((name) => socket.on(name, done));
        signal.addEventListener('abort', done);
    });
}

// Opens a WebSocket. Options: those of upgradeRequest; `with` (bytes in the
// same packet as the head); `autoPong`, `autoClose` (default true: pings and
// Close are answered as a good client does); `socket` (options of net.connect).
export async function connect(server, path, opt = {}) {
    const key = crypto.randomBytes(16).toString('base64');
    const answer = await handshake(server, path, { key, ...opt });
    if (answer.status !== 101) {
        answer.socket.destroy();
        throw Object.assign(new Error(`${path}: ${answer.status} ` +
            answer.rest.toString().trim()), { status: answer.status });
    }
    assert.equal(answer.headers['sec-websocket-accept'],
        acceptKey(opt.key ?? key), 'the server proved the wrong key');
    return new Peer(answer, opt);
}

// ----- a connection --------------------------------------------------------

export class Peer {
    frames = [];        // received, not yet taken by next()
    how = null;         // the stream's end: 'fin', 'rst', null: still open
    #waiting = [];
    #wrong = null;      // what the decoder objected to
    #closing = false;

    constructor({ socket, headers, rest }, opt = {}) {
        this.socket = socket;
        this.headers = headers;
        this.opt = { autoPong: true, autoClose: true, ...opt };
        this.decoder = new Decoder((f) => this.#arrived(f));
        socket.on('error', (e) => this.#ended(e.code === 'ECONNRESET' ||
            e.code === 'EPIPE' ? 'rst' : e.code));
        socket.on('end', () => {
            this.#ended('fin');
            socket.end();
        });
        socket.on('close', () => this.#ended('gone'));
        this.#feed(rest);
        socket.on('data', (chunk) => this.#feed(chunk));
        socket.resume();
    }

    // ----- sending

    // Bytes as they are. Resolves when the kernel has taken them all.
    send(...parts) {
        const all = parts.flat().map(bytes);
        const data = all.length === 1 ? all[0] : Buffer.concat(all);
        return new Promise((resolve) => this.socket.write(data, resolve));
    }
    // Bytes in pieces of `size`, each in a packet of its own; no more of them
    // once the server has closed.
    async chop(data, size = 1, gapMs = 0) {
        for (const part of cut(bytes(data), size)) {
            if (this.how || this.#closing)
                return;
            await this.send(part);
            await (gapMs ? setTimeout(gapMs) : setImmediate());
        }
    }
    text(data, opt) {
        return this.send(frame(OP.TEXT, data, opt));
    }
    binary(data, opt) {
        return this.send(frame(OP.BINARY, data, opt));
    }
    ping(data, opt) {
        return this.send(frame(OP.PING, data, opt));
    }
    pong(data, opt) {
        return this.send(frame(OP.PONG, data, opt));
    }
    // A Close; without a code, an empty one.
    close(code, reason, opt) {
        this.#closing = true;
        return this.send(frame(OP.CLOSE,
            code === undefined ? '' : closePayload(code, reason), opt));
    }
    // The end without a handshake: FIN, or RST.
    end() {
        this.socket.end();
    }
    reset() {
        this.socket.resetAndDestroy();
    }

    // ----- receiving

    // Stops and starts reading from the kernel.
    pause() {
        this.socket.pause();
    }
    resume() {
        this.socket.resume();
    }

    // The next frame, of whatever kind.
    async next(ms = PATIENCE) {
        for (const until = Date.now() + ms; ;) {
            if (this.frames.length)
                return this.frames.shift();
            if (this.#wrong)
                throw this.#wrong;
            if (this.how)
                throw new Error(`the stream ended (${this.how})`);
            if (Date.now() >= until)
                throw new Error(`no frame within ${ms} ms` +
                    (this.decoder.rest ?
                        `, ${this.decoder.rest} bytes of one` : ''));
            await this.#event(until - Date.now());
        }
    }

    // The next whole message, { opcode, data, text }; control frames that
    // come before its end are dropped, but a Close is an error.
    async message(ms = PATIENCE) {
        let first = null;
        const parts = [];
        for (const until = Date.now() + ms; ;) {
            const f = await this.next(Math.max(0, until - Date.now()));
            if (f.opcode === OP.CLOSE)
                throw new Error(`closed with ${f.code} "${f.reason}"`);
            if (f.opcode > 7)
                continue;
            assert.equal(f.opcode === OP.CONT, first !== null,
                'the server mixed up its fragments');
            first ??= f;
            parts.push(f.data);
            if (f.fin)
                return new Frame(true, first.opcode,
                    parts.length > 1 ? Buffer.concat(parts) : f.data);
        }
    }

    async messages(count, ms = PATIENCE) {
        const all = [], until = Date.now() + ms;
        while (all.length < count)
            all.push(await this.message(Math.max(0, until - Date.now())));
        return all;
    }

    // Asserts that nothing but pings arrives for a while.
    async silent(ms = 100 * SLOW) {
        await setTimeout(ms);
        const seen = this.frames.filter((f) => f.opcode !== OP.PING);
        assert.deepEqual(seen.map((f) => `${f.opcode}:${f.text}`), []);
        assert.equal(this.how, null, 'the stream ended');
    }

    // Waits for the end of the stream: { code, reason, how, frames }. `code` is
    // the Close frame's (1005 when empty, undefined when there was none), `how`
    // is 'fin' or 'rst', `frames` what came before and was not taken.
    async closed(ms = PATIENCE) {
        this.resume();
        for (const until = Date.now() + ms; !this.how && !this.#wrong;) {
            if (Date.now() >= until)
                throw new Error(`the stream did not end within ${ms} ms` +
                    `, got opcodes [${this.frames.map((f) => f.opcode)}]`);
            await this.#event(until - Date.now());
        }
        if (this.#wrong)
            throw this.#wrong;
        const frames = this.frames.splice(0);
        const close = frames.findIndex((f) => f.opcode === OP.CLOSE);
        assert.ok(close < 0 || close === frames.length - 1,
            'the server sent frames after its Close');
        const last = close < 0 ? undefined : frames.pop();
        return { code: last?.code, reason: last?.reason, how: this.how, frames };
    }

    // ----- inside

    // Called with every frame; a test with much traffic may put its own
    // function here, then next() and message() see nothing.
    onFrame(f) {
        this.frames.push(f);
    }

    #feed(chunk) {
        try {
            if (chunk.length && !this.#wrong)
                this.decoder.push(chunk);
        } catch (e) {
            this.#wrong = e;
        }
        this.#wake();
    }

    #arrived(f) {
        if (f.opcode === OP.PING && this.opt.autoPong)
            this.pong(f.data);
        if (f.opcode === OP.CLOSE && this.opt.autoClose && !this.#closing) {
            this.#closing = true;
            this.send(frame(OP.CLOSE, f.data.subarray(0, 2)));
        }
        this.onFrame(f);
    }

    #ended(how) {
        this.how ??= how;
        this.#wake();
    }

    #wake() {
        this.#waiting.splice(0).forEach((wakeUp) => wakeUp());
    }

    #event(ms) {
        return new Promise((resolve) => {
            const timer = globalThis.setTimeout(resolve, ms);
            this.#waiting.push(() => {
                clearTimeout(timer);
                resolve();
            });
        });
    }
}
