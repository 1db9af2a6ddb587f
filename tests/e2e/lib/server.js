// SPDX-License-Identifier: MIT
// Starts a real collabd on a free port of 127.0.0.1 for one test, and sees to it
// that it ends with the test: cleanly, with exit code 0 and without a report of
// a sanitizer, or the test fails.
//
//   test('…', async (t) => {
//       const server = await startServer(t, { args: ['--ring', '64K'] });
//       const peer = await server.connect('/ws/room');
//
// Tests that share a server are subtests (t.test) of one that started it.
// COLLABD names another binary, COLLABD_SLOW=1 says that it is slow.

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as pause } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { connect, handshake, SLOW } from './raw.js';

export { SLOW };
export const BINARY = process.env.COLLABD ??
    fileURLToPath(new URL('../../../build/collabd', import.meta.url));

const living = new Set();       // processes; none outlives this one
const slay = () => living.forEach((child) => child.kill('SIGKILL'));
process.on('exit', slay);
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'])
    process.once(signal, () => process.exit(1));

// `args`: more flags. `env`: more environment. `listen`: the address, or null
// for none. `tls`: true (a certificate for 127.0.0.1 and localhost is made), or
// { cert, key } (files); adds --tls-listen 127.0.0.1:0. `ready`: false does not
// wait for readiness, for tests of a start that fails.
export async function startServer(t, opt = {}) {
    const { args = [], env = {}, listen = '127.0.0.1:0', ready = true } = opt;
    const tls = opt.tls === true ? makeCertificate(t) : opt.tls;
    const words = [...(listen ? ['--listen', listen] : []), ...(tls ?
        ['--tls-listen', '127.0.0.1:0', '--tls-cert', tls.cert,
            '--tls-key', tls.key] : []), ...args];
    const child = spawn(BINARY, words, {
        env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'],
    });
    living.add(child);
    const server = new Server(child, words, tls);
    t.after(() => server.stop());
    if (ready) {
        await server.waitForLog(/^info: ready/, 10000 * SLOW);
        server.learnAddresses();
    }
    return server;
}

class Server {
    log = [];               // stderr, line by line
    stdout = '';
    exit = null;            // { code, signal } once it is gone
    sockets = new Set();    // of clients; destroyed before the server stops
    #stopped = null;
    #killed = false;
    #watchers = new Set();

    constructor(child, words, tls) {
        Object.assign(this, { child, words, certificate: tls, pid: child.pid });
        createInterface({ input: child.stderr }).on('line', (line) => {
            this.log.push(line);
            this.#watchers.forEach((look) => look());
        });
        child.stdout.on('data', (chunk) => (this.stdout += chunk));
        this.gone = new Promise((resolve) => {
            const done = (exit) => {
                living.delete(child);
                this.exit = exit;
                this.#watchers.forEach((look) => look());
                resolve(exit);
            };
            child.once('close', (code, signal) => done({ code, signal }));
            child.once('error', (e) => {
                this.log.push(`cannot run ${BINARY}: ${e.message}`);
                done({ code: null, signal: null });
            });
        });
    }

    // From the lines `info: listening on http://…`: port and url of the first
    // plain listener, tlsPort and tlsUrl of the first with TLS, all in addresses.
    learnAddresses() {
        this.addresses = this.log.map((line) =>
            line.match(/^info: listening on (\S+)/)?.[1]).filter(Boolean);
        const port = (scheme) => Number(this.addresses.find((a) =>
            a.startsWith(`${scheme}://`))?.match(/:(\d+)\/?$/)?.[1]) || undefined;
        this.port = port('http');
        this.tlsPort = port('https');
        this.url = `ws://127.0.0.1:${this.port}`;
        this.tlsUrl = `wss://127.0.0.1:${this.tlsPort}`;
    }

    // A raw WebSocket client, see raw.js. connectTls: the same through TLS.
    connect(where, opt) {
        return connect(this, where, opt);
    }
    connectTls(where, opt) {
        return connect(this.#overTls(), where, opt);
    }
    // The answer to an upgrade, whatever it is: { status, headers, socket, rest }.
    handshake(where, opt) {
        return handshake(this, where, opt);
    }
    #overTls() {
        return {
            port: this.tlsPort, sockets: this.sockets,
            tls: { ca: this.certificate.ca, servername: 'localhost' },
        };
    }

    // A bare HTTP request: { status, headers, body }.
    get(where, headers = {}, method = 'GET') {
        return new Promise((resolve, reject) => {
            const request = http.request({
                host: '127.0.0.1', port: this.port, path: where, method, headers,
                agent: false, timeout: 5000 * SLOW,
            }, async (response) => {
                let body = '';
                for await (const chunk of response.setEncoding('utf8'))
                    body += chunk;
                resolve({ status: response.statusCode, headers: response.headers,
                    body });
            });
            request.on('timeout', () => request.destroy(
                new Error(`no answer to ${method} ${where}`)));
            request.on('error', reject).end();
        });
    }

    // GET /metrics as { 'collabd_clients': 3,
    // 'collabd_closes_total{reason="slow"}': 1, … }.
    async metrics() {
        const { status, body } = await this.get('/metrics');
        assert.equal(status, 200, body);
        return Object.fromEntries(body.split('\n')
            .filter((line) => line && !line.startsWith('#'))
            .map((line) => line.match(/^(\S+?(?:\{.*\})?) (\S+)/))
            .map(([, name, value]) => [name, Number(value)]));
    }

    // Waits until a metric has a value, or one that satisfies a function; gives it.
    async waitForMetric(name, wanted, ms = 5000 * SLOW) {
        const good = typeof wanted === 'function' ? wanted : (x) => x === wanted;
        for (const until = Date.now() + ms; ; await pause(20)) {
            const value = (await this.metrics())[name];
            if (good(value))
                return value;
            assert.ok(Date.now() < until, `${name} is ${value}, not ${wanted}`);
        }
    }

    // The first log line, old or new, that matches (its match).
    waitForLog(regex, ms = 5000 * SLOW) {
        return new Promise((resolve, reject) => {
            const done = (act) => {
                clearTimeout(timer);
                this.#watchers.delete(look);
                act();
            };
            const fail = (why) => done(() => reject(new Error(
                `${why}: no log line ${regex}; ${this.describe()}`)));
            const look = () => {
                const match = this.log.map((line) => line.match(regex))
                    .find(Boolean);
                if (match)
                    done(() => resolve(match));
                else if (this.exit)
                    fail('the server is gone');
            };
            const timer = setTimeout(() => fail(`after ${ms} ms`), ms);
            this.#watchers.add(look);
            look();
        });
    }

    describe() {
        return `exit ${JSON.stringify(this.exit)}, ` +
            `${BINARY} ${this.words.join(' ')}\n${this.log.join('\n')}`;
    }

    signal(name) {
        this.child.kill(name);
    }

    // SIGTERM; asserts that it ends soon, with 0 and no sanitizer's report.
    // Clients of connect() are dropped first: let { keepClients: true } keep them.
    stop(opt = {}) {
        return (this.#stopped ??= this.#stop(opt));
    }

    async #stop({ keepClients = false }) {
        if (!keepClients)
            this.sockets.forEach((socket) => socket.destroy());
        let late = false;
        const timer = setTimeout(() => {
            late = true;
            this.child.kill('SIGKILL');
        }, 5000 * SLOW);
        if (!this.exit)
            this.child.kill('SIGTERM');
        await this.gone;
        clearTimeout(timer);
        this.sockets.forEach((socket) => socket.destroy());
        const report = this.log.find((line) =>
            /Sanitizer|runtime error:|Assertion .* failed/.test(line));
        assert.equal(report, undefined, this.describe());
        assert.ok(!late, `SIGTERM did not end the server; ${this.describe()}`);
        if (!this.#killed)
            assert.equal(this.exit.code, this.expectedExit ?? 0, this.describe());
    }

    // SIGKILL: as when the power goes.
    async kill() {
        this.#killed = true;
        this.child.kill('SIGKILL');
        await this.gone;
    }
}

// A self-signed P-256 certificate in a folder that goes with the test:
// { cert, key (files), ca (PEM, for clients) }.
export function makeCertificate(t, names = 'IP:127.0.0.1,DNS:localhost') {
    const dir = temporaryFolder(t);
    const [cert, key] = ['cert.pem', 'key.pem'].map((f) => path.join(dir, f));
    execFileSync('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt',
        'ec_paramgen_curve:P-256', '-nodes', '-days', '30', '-subj',
        '/CN=localhost', '-addext', `subjectAltName=${names}`,
        '-keyout', key, '-out', cert], { stdio: 'pipe' });
    return { cert, key, get ca() {
        return readFileSync(cert, 'utf8');
    } };
}

export function temporaryFolder(t) {
    const dir = mkdtempSync(path.join(os.tmpdir(), 'collabd-'));
    t.after(() => rmSync(dir, { recursive: true, force: true }));
    return dir;
}
