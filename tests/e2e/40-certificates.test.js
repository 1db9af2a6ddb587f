// SPDX-License-Identifier: MIT
// Goal: `collabd --make-cert DIR` makes a CA that can vouch for this box only
// and a certificate that clients of that CA accept, renews the latter when that
// is due, and touches nothing that it did not make. The judge is OpenSSL.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import crypto, { X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import tls from 'node:tls';
import { fileURLToPath } from 'node:url';

const BINARY = process.env.COLLABD ??
    fileURLToPath(new URL('../../build/collabd', import.meta.url));
const FILES = ['ca-key.pem', 'ca.crt', 'ca.pem', 'cert.pem', 'key.pem'];
const DAY = 86400e3;

// ----- helpers --------------------------------------------------------------

function folder(t) {
    const made = fs.mkdtempSync(path.join(os.tmpdir(), 'collabd-cert-'));
    fs.chmodSync(made, 0o755);
    t.after(() => fs.rmSync(made, { recursive: true, force: true }));
    return path.join(made, 'tls');
}

function checked(child, good) {
    const said = child.stderr;
    assert.ok(child.error === undefined, child.error);
    assert.equal(child.signal, null, said);
    assert.doesNotMatch(said, /Sanitizer|runtime error/);
    assert.equal(child.status === 0, good, said);
    assert.equal(/^error: /m.test(said), !good, said);
    return said;
}

// Runs it and gives what it said.
const makeCert = (dir, options = {}) => checked(spawnSync(BINARY,
    ['--make-cert', dir], { encoding: 'utf8', ...options }), true);

// The same where it must fail, saying all of `expected` and leaving no trace
// in the folder.
function refuses(dir, expected, options = {}) {
    const before = fs.existsSync(dir) && fs.statSync(dir).isDirectory() &&
        contents(dir);
    const said = checked(spawnSync(BINARY, ['--make-cert', dir],
        { encoding: 'utf8', ...options }), false);
    for (const pattern of expected)
        assert.match(said, pattern);
    if (before)
        assert.deepEqual(contents(dir), before);
}

function openssl(...args) {
    const child = spawnSync('openssl', args, { encoding: 'utf8' });
    return { ok: child.status === 0, text: child.stdout + child.stderr };
}

function sure(result) {
    assert.ok(result.ok, result.text);
    return result.text;
}

const contents = (dir) => Object.fromEntries(
    fs.readdirSync(dir, { withFileTypes: true })
        .sort((a, b) => (a.name < b.name ? -1 : 1))
        .map((entry) => [entry.name, entry.isFile() &&
            fs.readFileSync(path.join(dir, entry.name), 'latin1')]));

const leafOf = (dir) =>
    new X509Certificate(fs.readFileSync(path.join(dir, 'cert.pem')));
const caOf = (dir) =>
    new X509Certificate(fs.readFileSync(path.join(dir, 'ca.pem')));

const keyOf = (dir, name) =>
    crypto.createPrivateKey(fs.readFileSync(path.join(dir, name)));

const verify = (dir, ...more) => openssl('verify', '-x509_strict', '-CAfile',
    path.join(dir, 'ca.pem'), ...more);

// Another leaf, signed with the CA's own key by OpenSSL; left in other.pem.
function signOther(dir, { san, days = 100, key = 'key.pem', extra = '' }) {
    const at = (name) => path.join(dir, name);
    if (!fs.existsSync(at(key)))
        sure(openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout',
            '-out', at(key)));
    fs.writeFileSync(at('ext'), `subjectAltName=${san}\n` +
        'authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n' +
        `extendedKeyUsage=serverAuth\n${extra}`);
    sure(openssl('req', '-new', '-key', at(key), '-subj', '/CN=other',
        '-out', at('csr')));
    sure(openssl('x509', '-req', '-in', at('csr'), '-CA', at('ca.pem'),
        '-CAkey', at('ca-key.pem'), '-set_serial', '0x1234', '-sha256',
        '-days', String(days), '-extfile', at('ext'), '-out', at('other.pem')));
    fs.rmSync(at('ext'));
    fs.rmSync(at('csr'));
    return at('other.pem');
}

// Runs it on a machine of another name and with the addresses given, all on
// the loopback interface. Null: this system does not let us make one.
function elsewhere(host, addresses, dir) {
    const script = 'printf %s "$1" >/proc/sys/kernel/hostname && ' +
        'ip link set lo up && for a in $2; do ip addr add "$a" dev lo ' +
        'nodad || exit; done && echo begun >&2 && exec "$3" --make-cert "$4"';
    const child = spawnSync('unshare', [
        ...(process.getuid() === 0 ? [] : ['--user', '--map-root-user']),
        '--uts', '--net', 'sh', '-c', script, 'sh', host, addresses.join(' '),
        BINARY, dir,
    ], { encoding: 'utf8' });
    return child.error === undefined && /^begun$/m.test(child.stderr) ?
        child : null;
}

const SKIP_ELSEWHERE = 'needs unshare, ip and the right to use them';

// ----- a new folder ---------------------------------------------------------

test('a new folder gets a CA and a certificate for this machine', async (t) => {
    const dir = folder(t);
    const said = makeCert(dir);
    const host = os.hostname().toLowerCase();
    const leaf = leafOf(dir), ca = caOf(dir);

    await t.test('five files, the keys for the owner only', () => {
        assert.deepEqual(fs.readdirSync(dir).sort(), FILES);
        const mode = (name) => fs.statSync(path.join(dir, name)).mode & 0o777;
        assert.equal(fs.statSync(dir).mode & 0o777, 0o700);
        assert.equal(mode('key.pem'), 0o600);
        assert.equal(mode('ca-key.pem'), 0o600);
        assert.equal(mode('cert.pem') & 0o022, 0);
    });

    await t.test('it says what to do with the CA', () => {
        assert.match(said, /^info: .*ca\.pem made for .*install ca\.crt/m);
        assert.match(said, /^info: .*cert\.pem issued, because there was no/m);
    });

    await t.test('the chain stands up to strict checking', () => {
        sure(verify(dir, path.join(dir, 'cert.pem')));
        sure(verify(dir, path.join(dir, 'ca.pem')));
        assert.ok(leaf.checkPrivateKey(keyOf(dir, 'key.pem')));
        assert.ok(ca.checkPrivateKey(keyOf(dir, 'ca-key.pem')));
    });

    await t.test('it is good for all names and addresses of it', () => {
        for (const name of [host, `${host.split('.')[0]}.local`, 'localhost'])
            sure(verify(dir, '-verify_hostname', name,
                path.join(dir, 'cert.pem')));
        for (const address of ['127.0.0.1', '::1'])
            if (Object.values(os.networkInterfaces()).flat()
                .some((i) => i.address === address))
                sure(verify(dir, '-verify_ip', address,
                    path.join(dir, 'cert.pem')));
        assert.ok(!verify(dir, '-verify_hostname', 'example.org',
            path.join(dir, 'cert.pem')).ok);
        assert.ok(!verify(dir, '-verify_ip', '8.8.8.8',
            path.join(dir, 'cert.pem')).ok);
    });

    await t.test('the certificate holds what browsers ask for', () => {
        const text = sure(openssl('x509', '-in', path.join(dir, 'cert.pem'),
            '-noout', '-text'));
        assert.match(text, /ASN1 OID: prime256v1/);
        assert.match(text, /ecdsa-with-SHA256/);
        assert.match(text, /Key Usage: critical\s+Digital Signature\n/);
        assert.match(text, /TLS Web Server Authentication/);
        assert.match(text, /Subject Key Identifier/);
        assert.match(text, /Authority Key Identifier/);
        const from = Date.parse(leaf.validFrom), to = Date.parse(leaf.validTo);
        assert.ok(to - from <= 397 * DAY && to - from > 390 * DAY);
        assert.ok(from < Date.now() && from > Date.now() - 2 * DAY);
        assert.match(leaf.serialNumber, /^[4-7][0-9A-F]{31}$/);
        assert.notEqual(leaf.serialNumber, ca.serialNumber);
    });

    await t.test('the CA is one, for ten years, for this box only', () => {
        const text = sure(openssl('x509', '-in', path.join(dir, 'ca.pem'),
            '-noout', '-text'));
        assert.match(text,
            /Basic Constraints: critical\s+CA:TRUE, pathlen:0\n/);
        assert.match(text, /Key Usage: critical\s+Certificate Sign, CRL Sign/);
        assert.match(text, /Name Constraints: critical\s+Permitted:/);
        assert.doesNotMatch(text, /Excluded/);
        for (const permitted of [`DNS:${host}`, 'DNS:localhost',
            'IP:10.0.0.0/255.0.0.0', 'IP:172.16.0.0/255.240.0.0',
            'IP:192.168.0.0/255.255.0.0', 'IP:169.254.0.0/255.255.0.0',
            'IP:100.64.0.0/255.192.0.0', 'IP:127.0.0.0/255.0.0.0',
            'IP:FC00:0:0:0:0:0:0:0/FE00:0:0:0:0:0:0:0',
            'IP:FE80:0:0:0:0:0:0:0/FFC0:0:0:0:0:0:0:0',
            'IP:0:0:0:0:0:0:0:1/FFFF:FFFF:FFFF:FFFF:FFFF:FFFF:FFFF:FFFF'])
            assert.ok(text.includes(`${permitted}\n`), permitted);
        assert.equal(text.match(/^ +(DNS|IP):/gm).length, 12);
        const years = (Date.parse(ca.validTo) - Date.parse(ca.validFrom)) /
            DAY / 365;
        assert.ok(years > 9.9 && years < 10.1);
        assert.match(ca.subject,
            new RegExp(`^CN=collabd CA ${host.slice(0, 40)} [0-9a-f]{6}$`));
    });

    await t.test('ca.crt is the same CA as DER', () => {
        assert.deepEqual(fs.readFileSync(path.join(dir, 'ca.crt')), ca.raw);
    });

    await t.test('cert.pem is the certificate and then the CA', () => {
        const both = contents(dir)['cert.pem'];
        assert.ok(both.endsWith(contents(dir)['ca.pem']));
        assert.equal(both.match(/BEGIN CERTIFICATE/g).length, 2);
    });
});

test('two CAs of one hostname can be told apart', (t) => {
    const a = folder(t), b = folder(t);
    makeCert(a);
    makeCert(b);
    assert.notEqual(caOf(a).subject, caOf(b).subject);
    assert.ok(!verify(a, path.join(b, 'cert.pem')).ok);
});

// ----- what the CA cannot do ------------------------------------------------

test('with the CA key nobody can play another site', async (t) => {
    const dir = folder(t);
    makeCert(dir);
    const host = os.hostname().toLowerCase();

    for (const san of ['DNS:example.org', 'DNS:localhost.example.org',
        `DNS:${host}x`, 'DNS:other.local', 'IP:8.8.8.8', 'IP:172.32.0.1',
        'IP:100.128.0.1', 'IP:2001:db8::1', 'IP:::2',
        'DNS:localhost,DNS:example.org']) {
        await t.test(`${san} is refused`, () => {
            const { ok, text } = verify(dir, signOther(dir, { san }));
            assert.ok(!ok);
            assert.match(text, /permitted subtree violation/);
        });
    }
    for (const san of ['DNS:localhost', 'IP:10.255.255.255', 'IP:172.31.0.1',
        'IP:100.127.0.1', 'IP:fd12::1', 'IP:fe80::1'])
        await t.test(`${san} is this box`, () => {
            sure(verify(dir, signOther(dir, { san })));
        });

    await t.test('nor make a CA below it', () => {
        const under = signOther(dir, { san: 'DNS:localhost', key: 'sub.key',
            extra: 'basicConstraints=critical,CA:TRUE\n' +
                'keyUsage=critical,keyCertSign\n' });
        const sub = path.join(dir, 'sub.pem');
        fs.renameSync(under, sub);
        const nested = folder(t);
        fs.mkdirSync(nested);
        fs.copyFileSync(sub, path.join(nested, 'ca.pem'));
        fs.copyFileSync(path.join(dir, 'sub.key'),
            path.join(nested, 'ca-key.pem'));
        const { ok, text } = verify(dir, '-untrusted', sub,
            signOther(nested, { san: 'DNS:localhost' }));
        assert.ok(!ok);
        assert.match(text, /path length constraint exceeded/);
    });
});

// ----- handshakes -----------------------------------------------------------

test('openssl s_client accepts a server with it', async (t) => {
    const dir = folder(t);
    makeCert(dir);
    const server = tls.createServer({
        cert: fs.readFileSync(path.join(dir, 'cert.pem')),
        key: fs.readFileSync(path.join(dir, 'key.pem')),
    }, (socket) => socket.on('error', () => {}).end('hello\n'));
    server.on('tlsClientError', () => {});
    t.after(() => server.close());
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');

    for (const [more, good] of [
        [['-verify_hostname', 'localhost'], true],
        [['-verify_ip', '127.0.0.1'], true],
        [['-verify_hostname', 'localhost', '-tls1_2'], true],
        [['-verify_hostname', 'example.org'], false],
    ]) {
        const child = spawn('openssl', ['s_client', '-connect',
            `127.0.0.1:${server.address().port}`, '-verify_return_error',
            '-x509_strict', '-CAfile', path.join(dir, 'ca.pem'), ...more],
        { stdio: ['pipe', 'pipe', 'pipe'] });
        let text = '';
        child.stdout.on('data', (data) => text += data);
        child.stderr.on('data', (data) => text += data);
        child.stdin.on('error', () => {});
        await once(child, 'close');
        assert.equal(text.includes('hello'), good, text);
        assert.equal(/Verify return code: 0 \(ok\)/.test(text), good, text);
    }
});

test('Node accepts openssl s_server with it', async (t) => {
    const dir = folder(t);
    makeCert(dir);
    const child = spawn('openssl', ['s_server', '-accept', '127.0.0.1:0',
        '-cert', path.join(dir, 'cert.pem'), '-cert_chain',
        path.join(dir, 'cert.pem'), '-key', path.join(dir, 'key.pem'), '-www'],
    { stdio: ['ignore', 'pipe', 'inherit'] });
    const gone = once(child, 'close');
    t.after(async () => {
        child.kill('SIGKILL');
        await gone;
    });
    let said = '';
    while (!/ACCEPT \S+:\d+/.test(said))
        said += (await once(child.stdout, 'data'))[0];
    const port = Number(said.match(/ACCEPT \S+:(\d+)/)[1]);
    const connect = (options) => new Promise((resolve, reject) => {
        const socket = tls.connect({ port, host: '127.0.0.1', ...options });
        socket.on('error', reject);
        socket.on('secureConnect', () => {
            socket.destroy();
            resolve(socket.authorized);
        });
    });

    const ca = fs.readFileSync(path.join(dir, 'ca.pem'));
    assert.equal(await connect({ ca }), true);
    assert.equal(await connect({ ca, servername: 'localhost' }), true);
    await assert.rejects(connect({ ca, servername: 'example.org' }),
        { code: 'ERR_TLS_CERT_ALTNAME_INVALID' });
    await assert.rejects(connect({}));
});

// ----- a second run ---------------------------------------------------------

test('a second run keeps everything', (t) => {
    const dir = folder(t);
    makeCert(dir);
    const before = contents(dir);
    assert.match(makeCert(`${dir}/`), /cert\.pem kept, good until 20\d\d-/);
    assert.deepEqual(contents(dir), before);
});

test('a certificate is issued again when that is due', async (t) => {
    const dir = folder(t);
    const at = (name) => path.join(dir, name);
    makeCert(dir);

    // Runs it after `spoil`: only the files named are new, and it says why.
    const renews = (what, spoil, changes, why) => t.test(what, () => {
        const before = contents(dir);
        spoil();
        const said = makeCert(dir);
        assert.match(said, why);
        const after = contents(dir);
        assert.deepEqual(Object.keys(after), FILES);
        assert.deepEqual(FILES.filter((f) => after[f] !== before[f]), changes);
        sure(verify(dir, at('cert.pem')));
        assert.ok(leafOf(dir).checkPrivateKey(keyOf(dir, 'key.pem')));
        assert.match(makeCert(dir), /kept/);
    });
    const san = leafOf(dir).subjectAltName.replaceAll('IP Address', 'IP');

    await renews('when it is gone', () => fs.rmSync(at('cert.pem')),
        ['cert.pem'], /issued, because there was none/);
    await renews('when its key is gone', () => fs.rmSync(at('key.pem')),
        ['cert.pem', 'key.pem'], /issued, because key\.pem was not its key/);
    await renews('when the key is another', () => sure(openssl('ecparam',
        '-name', 'prime256v1', '-genkey', '-noout', '-out', at('key.pem'))),
    ['cert.pem', 'key.pem'], /issued, because key\.pem was not its key/);
    await renews('when it is cut short behind the certificate', () =>
        fs.truncateSync(at('cert.pem'), fs.statSync(at('cert.pem')).size - 9),
    ['cert.pem'], /issued, because ca\.pem was not behind it/);
    const placeOther = (options) => {
        signOther(dir, options);
        fs.appendFileSync(at('other.pem'), fs.readFileSync(at('ca.pem')));
        fs.renameSync(at('other.pem'), at('cert.pem'));
    };
    await renews('when it ends in 29 days',
        () => placeOther({ san, days: 29 }), ['cert.pem'],
        /issued, because it had less than 30 days left/);
    await renews('when it lacks a name of the machine',
        () => placeOther({ san: san.replace('DNS:localhost, ', '') }),
        ['cert.pem'], /issued, because the machine has a new name or address/);
    await renews('ca.crt is mended', () => fs.writeFileSync(at('ca.crt'), 'x'),
        [], /kept/);
    await t.test('but not when it ends in 31 days', () => {
        placeOther({ san, days: 31 });
        const before = contents(dir);
        assert.match(makeCert(dir), /kept/);
        assert.deepEqual(contents(dir), before);
    });
    await t.test('nor when it has a name too many', () => {
        placeOther({ san: `${san}, IP:10.9.8.7` });
        const before = contents(dir);
        assert.match(makeCert(dir), /kept/);
        assert.deepEqual(contents(dir), before);
    });
});

test('a CA brought from elsewhere is kept and used', (t) => {
    const dir = folder(t);
    fs.mkdirSync(dir);
    sure(openssl('req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout',
        path.join(dir, 'ca-key.pem'), '-out', path.join(dir, 'ca.pem'),
        '-days', '1000', '-subj', '/CN=Our house CA',
        '-addext', 'keyUsage=critical,keyCertSign'));
    const before = contents(dir);
    makeCert(dir);
    assert.equal(contents(dir)['ca.pem'], before['ca.pem']);
    assert.equal(contents(dir)['ca-key.pem'], before['ca-key.pem']);
    sure(verify(dir, '-verify_hostname', 'localhost',
        path.join(dir, 'cert.pem')));
    assert.match(makeCert(dir), /kept/);
});

test('a certificate does not outlive its CA, nor is always due', (t) => {
    const dir = folder(t);
    makeCert(dir);
    sure(openssl('x509', '-in', path.join(dir, 'ca.pem'), '-days', '20',
        '-signkey', path.join(dir, 'ca-key.pem'),
        '-out', path.join(dir, 'new.pem')));
    fs.renameSync(path.join(dir, 'new.pem'), path.join(dir, 'ca.pem'));
    fs.rmSync(path.join(dir, 'cert.pem'));
    assert.match(makeCert(dir), /^warning: .*ca\.pem ends on .*--make-cert/m);
    assert.equal(leafOf(dir).validTo, caOf(dir).validTo);
    assert.match(makeCert(dir), /kept/);
});

test('many at once leave one that is whole', async (t) => {
    const dir = folder(t);
    const runs = Array.from({ length: 6 }, () => spawn(BINARY,
        ['--make-cert', dir], { stdio: 'ignore' }));
    for (const [code] of await Promise.all(runs.map((r) => once(r, 'close'))))
        assert.equal(code, 0);
    assert.deepEqual(fs.readdirSync(dir).sort(), FILES);
    sure(verify(dir, path.join(dir, 'cert.pem')));
    assert.match(makeCert(dir), /kept/);
});

// ----- another machine ------------------------------------------------------

test('new addresses are taken up, public ones are left out', (t) => {
    const dir = folder(t);
    const first = elsewhere('box.example.org', ['10.1.2.3/8'], dir);
    if (first === null)
        return t.skip(SKIP_ELSEWHERE);
    checked(first, true);
    const names = () => leafOf(dir).subjectAltName.split(', ')
        .map((name) => name.replace(/^(DNS|IP Address):/, ''));
    assert.deepEqual(names().slice(0, 5), ['box.example.org', 'box.local',
        'localhost', '127.0.0.1', '10.1.2.3']);

    const second = checked(elsewhere('box.example.org', ['10.1.2.3/8',
        '192.168.7.7/24', '9.9.9.9/32', 'fd00::7/64', '2001:db8::7/64'], dir),
    true);
    assert.match(second, /issued, because the machine has a new name or addr/);
    assert.match(second, /^info: .* is without 9\.9\.9\.9, which ca\.pem/m);
    assert.match(second, /^info: .* is without 2001:db8::7, which/m);
    assert.deepEqual(names().filter((name) => /^(10|192|9|2001|FD00)/i
        .test(name)), ['10.1.2.3', '192.168.7.7', 'FD00:0:0:0:0:0:0:7']);
    sure(verify(dir, '-verify_ip', '192.168.7.7', '-verify_hostname',
        'box.local', path.join(dir, 'cert.pem')));

    assert.match(checked(elsewhere('box.example.org', ['10.1.2.3/8'], dir),
        true), /kept/);
});

test('a new hostname needs a new CA, and it says so', (t) => {
    const dir = folder(t);
    const child = elsewhere('old', [], dir);
    if (child === null)
        return t.skip(SKIP_ELSEWHERE);
    checked(child, true);
    const before = contents(dir);
    const said = checked(elsewhere('NEW', ['10.0.0.9/8'], dir), true);
    assert.match(said, /^warning: .* without new, which .* move all files/m);
    assert.match(said, /^warning: .* without new\.local, which/m);
    assert.equal(contents(dir)['ca.pem'], before['ca.pem']);
    assert.match(leafOf(dir).subjectAltName, /^DNS:localhost, IP/);
    sure(verify(dir, '-verify_ip', '10.0.0.9', path.join(dir, 'cert.pem')));
});

test('a hundred addresses are as many as fit', (t) => {
    const dir = folder(t);
    const many = Array.from({ length: 100 }, (_, i) => `fd00::${i + 1}/64`);
    const child = elsewhere(`${'a'.repeat(63)}`, many, dir);
    if (child === null)
        return t.skip(SKIP_ELSEWHERE);
    assert.match(checked(child, true),
        /fd00::[0-9a-f]+, for which there is no room/);
    sure(verify(dir, path.join(dir, 'cert.pem')));
    const count = leafOf(dir).subjectAltName.match(/FD00:/g).length;
    assert.ok(count > 40 && count < 60, `${count} addresses`);
});

test('a hostname that cannot stand in a certificate is named', async (t) => {
    for (const host of ['my_box', '(none)', '-box', 'box-', 'a..b', 'a.',
        'b\u00fccher', 'a b']) {
        const dir = folder(t);
        const child = elsewhere(host, [], dir);
        if (child === null)
            return t.skip(SKIP_ELSEWHERE);
        const said = checked(child, false);
        assert.match(said, /the hostname '.*' cannot stand in a certificate/);
        assert.match(said, /set one of letters, digits, hyphens and dots/);
        assert.deepEqual(fs.readdirSync(dir), []);
    }
});

// ----- bad input ------------------------------------------------------------

test('what it cannot take is an error that helps', async (t) => {
    const dir = folder(t);
    const at = (name) => path.join(dir, name);
    makeCert(dir);
    const good = contents(dir);
    const restore = () => {
        fs.readdirSync(dir).forEach((name) =>
            fs.rmSync(at(name), { recursive: true }));
        for (const [name, data] of Object.entries(good))
            fs.writeFileSync(at(name), data, { encoding: 'latin1',
                mode: name.includes('key') ? 0o600 : 0o644 });
    };
    const other = folder(t);
    makeCert(other);
    const stranger = contents(other);
    const bad = (what, spoil, ...expected) => t.test(what, () => {
        restore();
        spoil();
        refuses(dir, expected);
    });
    const put = (name, data) => () => fs.writeFileSync(at(name), data);

    for (const [name, what, remedy] of [
        ['ca.pem', /ca\.pem is not a certificate/, /move all files there away/],
        ['cert.pem', /cert\.pem is not a certificate/, /or move it away/],
        ['ca-key.pem', /ca-key\.pem is not a private key/, /move all files/],
        ['key.pem', /\/key\.pem is not a private key/, /or move it away/],
    ]) {
        const half = good[name].slice(0, good[name].indexOf('\n-----END') / 2);
        const mangled = good[name].replace(/^M.{9}/m, 'MIIB////AA');
        await bad(`${name} empty`, put(name, ''), what, remedy);
        await bad(`${name} garbage`, put(name, 'What?\n'), what, remedy);
        await bad(`${name} of zeros`, put(name, Buffer.alloc(700)),
            what, remedy);
        await bad(`${name} cut`, put(name, half), what, remedy);
        await bad(`${name} mangled`, put(name, mangled), what, remedy);
        await bad(`${name} huge`, put(name, Buffer.alloc(1 << 20, 'A')),
            new RegExp(`${name}: File too large: `));
        await bad(`${name} a folder`, () => {
            fs.rmSync(at(name));
            fs.mkdirSync(at(name));
        }, new RegExp(`${name}: Is a directory: `));
    }
    await bad('ca-key.pem of another',
        put('ca-key.pem', stranger['ca-key.pem']),
        /ca-key\.pem does not belong to ca\.pem/, /put the right file back/);
    await bad('ca-key.pem missing', () => fs.rmSync(at('ca-key.pem')),
        /ca-key\.pem is missing beside ca\.pem/, /put the right file back/);
    await bad('a leaf as the CA', () => {
        put('ca.pem', good['cert.pem'])();
        put('ca-key.pem', good['key.pem'])();
    }, /ca\.pem is not a CA/);
    await bad('a certificate of somebody else', () => {
        put('cert.pem', stranger['cert.pem'])();
        put('key.pem', stranger['key.pem'])();
    }, /cert\.pem was not issued by the ca\.pem there/, /or move it away/);
    await bad('a certificate without a CA', () => {
        fs.rmSync(at('ca.pem'));
        fs.rmSync(at('ca-key.pem'));
    }, /cert\.pem was not issued by the ca\.pem there/);
    await bad('a key with a password', () => put('key.pem',
        sure(openssl('ec', '-in', path.join(other, 'key.pem'), '-aes128',
            '-passout', 'pass:x')))(),
    /key\.pem is not a private key without password/);
    await bad('a CA that has ended', () => {
        sure(openssl('x509', '-in', at('ca.pem'), '-days', '-1', '-signkey',
            at('ca-key.pem'), '-out', at('new.pem')));
        fs.renameSync(at('new.pem'), at('ca.pem'));
    }, /ca\.pem ends on 20\d\d-\d\d-\d\d: if the clock is right, move all/);

    await t.test('and what is mended works again', () => {
        restore();
        assert.match(makeCert(dir), /kept/);
    });
});

test('a folder that will not do is an error that helps', async (t) => {
    await t.test('a file', () => {
        const dir = folder(t);
        fs.writeFileSync(dir, '');
        refuses(dir, [/Not a directory: name a folder/]);
    });
    await t.test('in a folder that is not there', () => {
        refuses(`${folder(t)}/a/b`, [/a\/b: No such file or directory: /]);
    });
    await t.test('with too long a name', () => {
        refuses(`${folder(t)}/${'a'.repeat(5000)}`, [/File name too long: /]);
        const long = `${folder(t)}/${`${'a'.repeat(99)}/`.repeat(60)}`;
        refuses(long.slice(0, 4090), [/File name too long: /]);
        refuses(long.slice(0, 4080), [/No such file or directory: /]);
    });
    await t.test('without a name', () => {
        refuses('', [/^error: /m]);
    });
    await t.test('where this user may not write', () => {
        const dir = folder(t);
        const nobody = process.getuid() === 0 ? { uid: 65534, gid: 65534 } : {};
        fs.mkdirSync(dir);
        fs.chmodSync(dir, 0o555);
        refuses(dir, [/ca-key\.pem: Permission denied: name a folder where/],
            nobody);
        refuses(`${dir}/in`, [/in: Permission denied: name a folder/], nobody);
        fs.chmodSync(dir, 0o755);
    });
    await t.test('on a full disk', () => {
        const dir = folder(t);
        fs.mkdirSync(dir);
        const child = spawnSync('sh', ['-c', 'trap "" XFSZ; ulimit -f 0; ' +
            'exec "$0" --make-cert "$1"', BINARY, dir], { encoding: 'utf8' });
        assert.match(checked(child, false),
            /ca-key\.pem: File too large: .*and that has room/);
        assert.deepEqual(fs.readdirSync(dir), []);
    });
});

test('a run that was broken off is taken up', (t) => {
    const dir = folder(t);
    makeCert(dir);
    // The order of writing: ca-key.pem, key.pem, ca.pem, ca.crt, cert.pem.
    const order = ['cert.pem', 'ca.crt', 'ca.pem', 'key.pem'];
    for (let n = 1; n <= order.length; n++) {
        order.slice(0, n).forEach((name) => fs.rmSync(path.join(dir, name)));
        fs.writeFileSync(path.join(dir, `.${order[n - 1]}.new`), 'half');
        makeCert(dir);
        assert.deepEqual(fs.readdirSync(dir).sort(), FILES);
        sure(verify(dir, path.join(dir, 'cert.pem')));
        assert.match(makeCert(dir), /kept/);
    }
});
