// SPDX-License-Identifier: MIT
// Goal: collabd works behind nginx as people set it up: wss ends at nginx,
// collabd listens on a port or a unix socket, and believes X-Forwarded-For from
// nginx and from nobody else.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import crypto from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import https from 'node:https';
import net from 'node:net';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import WebSocket from 'ws';
import { OP, SLOW, connect, frame } from './lib/raw.js';
import { makeCertificate, startServer, temporaryFolder } from './lib/server.js';

const NGINX = ['nginx', '/usr/sbin/nginx', '/usr/local/sbin/nginx'].find((name) =>
    spawnSync(name, ['-v']).status === 0);
const BEHIND = { skip: NGINX ? false : 'nginx is not installed', timeout: 60000 * SLOW };
if (!NGINX)
    console.log('nginx is not installed: the tests behind it are skipped');

async function freePort() {
    const server = net.createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address();
    server.close();
    await once(server, 'close');
    return port;
}

// An nginx of its own in a folder of its own, on three ports: TLS that names the
// client, TLS that names another one (`forwarded`), and plain.
async function startNginx(t, upstream) {
    const dir = temporaryFolder(t);
    const certificate = makeCertificate(t);
    const [ports] = [await Promise.all([freePort(), freePort(), freePort()])];
    const site = (listen, forwarded) => `
    server {
        listen 127.0.0.1:${listen};
        ssl_certificate ${certificate.cert};
        ssl_certificate_key ${certificate.key};
        location / {
            proxy_pass http://${upstream};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For ${forwarded};
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_read_timeout 60s;
            proxy_buffering off;
        }
    }`;
    fs.writeFileSync(path.join(dir, 'nginx.conf'), `
daemon off;
master_process off;
pid ${dir}/pid;
error_log stderr warn;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path ${dir}/body;
    proxy_temp_path ${dir}/proxy;
    fastcgi_temp_path ${dir}/fastcgi;
    uwsgi_temp_path ${dir}/uwsgi;
    scgi_temp_path ${dir}/scgi;
    map $http_upgrade $connection_upgrade { default upgrade; '' close; }
    ${site(`${ports[0]} ssl`, '$proxy_add_x_forwarded_for')}
    ${site(`${ports[1]} ssl`, '$http_x_pretend')}
    ${site(ports[2], '$proxy_add_x_forwarded_for')}
}
`);
    const child = spawn(NGINX, ['-p', dir, '-c', path.join(dir, 'nginx.conf')],
        { stdio: ['ignore', 'ignore', 'pipe'] });
    let said = '';
    child.stderr.on('data', (chunk) => (said += chunk));
    const gone = once(child, 'close');
    t.after(() => (child.kill('SIGTERM'), gone));
    for (const until = Date.now() + 5000 * SLOW; ;) {
        const up = await new Promise((resolve) => {
            const socket = net.connect(ports[2], '127.0.0.1', () => resolve(true));
            socket.on('error', () => resolve(false)).on('connect', () => socket.destroy());
        });
        if (up)
            break;
        assert.ok(Date.now() < until && child.exitCode === null, `nginx: ${said}`);
        await setTimeout(20);
    }
    const over = (port) => ({ port, tls: { ca: certificate.ca, servername: 'localhost' } });
    return {
        certificate, tls: over(ports[0]), pretend: over(ports[1]),
        plain: { port: ports[2] },
    };
}

// [what, the server's address, what nginx calls it, who is to be trusted]
const UPSTREAMS = [
    ['a port', '127.0.0.1:0', (server) => `127.0.0.1:${server.port}`, '127.0.0.1'],
    ['a unix socket', 'unix', (server) => server.addresses[0], 'unix'],
];

async function behind(t, [, listen, name, trusted], args = []) {
    const place = listen === 'unix' ?
        `unix:${path.join(temporaryFolder(t), 'sock')}` : listen;
    const server = await startServer(t,
        { listen: place, args: ['--trust-proxy', trusted, ...args] });
    return { server, nginx: await startNginx(t, name(server)) };
}

const get = (where, { port, tls: { ca } }, headers = {}) => new Promise((resolve, reject) => {
    https.get({ host: '127.0.0.1', servername: 'localhost', port, path: where,
        headers, ca, agent: false },
        async (answer) => {
            const chunks = await answer.toArray();
            resolve({ status: answer.statusCode, headers: answer.headers,
                body: Buffer.concat(chunks).toString() });
        }).on('error', reject);
});

for (const upstream of UPSTREAMS) {
    test(`wss ends at nginx, behind it collabd listens on ${upstream[0]}`, BEHIND, async (t) => {
        const { nginx } = await behind(t, upstream);
        const url = `wss://127.0.0.1:${nginx.tls.port}/ws/proxied`;
        const [sender, member] = await Promise.all([1, 2].map(async () => {
            const client = new WebSocket(url, { ca: nginx.certificate.ca,
                origin: `https://127.0.0.1:${nginx.tls.port}` });
            await once(client, 'open');
            return client;
        }));
        const sizes = [0, 1, 125, 126, 65535, 65536, 500000];
        const got = [];
        member.on('message', (data) => got.push(data));
        const sent = sizes.map((size) => crypto.randomBytes(size));
        sent.forEach((data) => sender.send(data));
        for (const until = Date.now() + 10000 * SLOW; got.length < sizes.length;) {
            assert.ok(Date.now() < until, `${got.length} of ${sizes.length} arrived`);
            await setTimeout(10);
        }
        got.forEach((data, i) => assert.ok(data.equals(sent[i]), `message ${i}`));
        sender.close(1000);
        assert.equal((await once(sender, 'close'))[0], 1000);
        member.terminate();
    });

    test(`Close codes and frames behind the head pass nginx to ${upstream[0]}`, BEHIND, async (t) => {
        const { nginx } = await behind(t, upstream);
        for (const place of [nginx.tls, nginx.plain]) {
            const peer = await connect(place, '/ws/x?echo=1',
                { with: frame(OP.TEXT, 'early') });
            assert.equal((await peer.message()).text, 'early');
            await peer.ping('still there?');
            assert.equal((await peer.next()).text, 'still there?');
            await peer.text('x', { mask: false });
            assert.equal((await peer.closed()).code, 1002);
        }
    });

    test(`Refusals and files pass nginx from ${upstream[0]}`, BEHIND, async (t) => {
        const www = temporaryFolder(t);
        const data = crypto.randomBytes(300000).toString('hex');
        fs.writeFileSync(path.join(www, 'file.txt'), data);
        const { nginx } = await behind(t, upstream, ['--www', www]);
        const file = await get('/file.txt', nginx.tls);
        assert.equal(file.status, 200);
        assert.ok(file.body === data);
        const again = await get('/file.txt', nginx.tls,
            { 'If-None-Match': file.headers.etag });
        assert.equal(again.status, 304);
        assert.equal((await get('/nothing', nginx.tls)).status, 404);
        assert.equal((await get('/healthz', nginx.tls, { Host: 'evil.example' })).status, 421);
        const stranger = connect(nginx.tls, '/ws/x',
            { headers: { Origin: 'http://evil.example' } });
        await assert.rejects(stranger, { status: 403 });
        const evil = connect(nginx.tls, '/ws/x', { headers: { Host: 'evil.example' } });
        await assert.rejects(evil, { status: 421 });
    });

    test(`The client is the one that nginx names to ${upstream[0]}, not the one it names itself`, BEHIND, async (t) => {
        const { nginx } = await behind(t, upstream, ['--max-per-ip', '1']);
        const pretend = (address) => connect(nginx.pretend, '/ws/x',
            { headers: { 'X-Pretend': address } });
        const first = await pretend('198.51.100.1');
        await assert.rejects(pretend('198.51.100.1'), { status: 429 });
        await assert.rejects(pretend('203.0.113.9, 198.51.100.1'), { status: 429 });
        await pretend('198.51.100.2');
        await pretend('198.51.100.1, 198.51.100.3');
        await first.silent();
        first.socket.destroy();

        const foreign = await get('/metrics', nginx.pretend, { 'X-Pretend': '198.51.100.9' });
        assert.ok([401, 403].includes(foreign.status), `got ${foreign.status}`);
        const health = await get('/healthz', nginx.pretend, { 'X-Pretend': '198.51.100.9' });
        assert.equal(health.status, 200);
    });

    test(`A token gets in through nginx to ${upstream[0]}, and the cookie is Secure`, BEHIND, async (t) => {
        const tokens = path.join(temporaryFolder(t), 'tokens');
        const hash = crypto.createHash('sha256').update('let-me-in').digest('hex');
        fs.writeFileSync(tokens, `${hash} write *\n`, { mode: 0o600 });
        const { server, nginx } = await behind(t, upstream, ['--tokens', tokens]);
        const page = await get('/healthz?token=let-me-in&a=1', nginx.tls);
        assert.ok([302, 303, 307].includes(page.status), `got ${page.status}`);
        assert.equal(page.headers.location, '/healthz?a=1');
        const [cookie] = page.headers['set-cookie'];
        assert.match(cookie, /;\s*Secure(;|$)/i, 'X-Forwarded-Proto: https');
        const peer = await connect(nginx.tls, '/ws/x?echo=1',
            { headers: { Cookie: cookie.split(';')[0] } });
        await peer.text('in');
        assert.equal((await peer.message()).text, 'in');
        const stranger = await connect(nginx.tls, '/ws/x');
        assert.equal((await stranger.closed()).code, 4401);
        fs.writeFileSync(tokens, '# nobody\n');
        server.signal('SIGHUP');
        assert.equal((await peer.closed()).code, 4401);
    });
}

test('When clients vanish behind nginx, collabd forgets them', BEHIND, async (t) => {
    const { server, nginx } = await behind(t, UPSTREAMS[0]);
    const descriptors = () => fs.readdirSync(`/proc/${server.pid}/fd`).length;
    const before = descriptors();
    const peers = await Promise.all(Array.from({ length: 20 }, () =>
        connect(nginx.tls, '/ws/x')));
    assert.ok(descriptors() >= before + 20);
    peers.forEach((peer) => peer.socket.destroy());
    for (const until = Date.now() + 5000 * SLOW; descriptors() > before;) {
        assert.ok(Date.now() < until, `${descriptors() - before} clients stay`);
        await setTimeout(20);
    }
});
