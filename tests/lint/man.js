#!/usr/bin/env node
// SPDX-License-Identifier: MIT
//
// Do the papers say what the program says? Compares every setting and action of
// `collabd --help`, its value's name and its default with port/man/collabd.8;
// the rows of README.md's table of settings with the same; and the settings
// that a reload changes and the close codes, which --help does not print, with
// the tables of collabd.c. The manual must pass mandoc -T lint, if mandoc is
// there.
//
// The README has only the settings that matter: a row may be missing there, but
// none may be wrong.

import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../../', import.meta.url));
const read = (name) => readFileSync(root + name, 'utf8');
const binary = process.env.COLLABD ?? `${root}build/collabd`;
const manual = 'port/man/collabd.8';

const faults = [];
const fault = (text) => faults.push(text);

function run(file, args) {
    const child = spawnSync(file, args, { encoding: 'utf8' });
    if (child.error || child.status !== 0)
        throw new Error(`${file} ${args.join(' ')}: ` +
            (child.error?.message ?? child.stderr));
    return child.stdout;
}

// ----- what is said where: name -> { value, preset } (undefined: none)

function fromHelp() {
    const all = new Map();
    for (const line of run(binary, ['--help']).split('\n')) {
        const found = line.match(
            /^ {2}--(\S+) ?(\S*) +(?:\S.*?)(?: \[([^\][]*)\])?$/);
        if (found)
            all.set(found[1], { value: found[2], preset: found[3] });
    }
    return all;
}

function fromManual(text) {
    const all = new Map();
    for (const part of text.split(/^\.It /m).slice(1)) {
        const [, name, value = ''] = part.match(/^Fl -(\S+)(?: Ar (\S+))?\n/) ?? [];
        if (name === undefined)
            continue;
        const body = part.split(/^\.El/m)[0];
        if (all.has(name))
            fault(`${manual}: --${name} stands there twice`);
        all.set(name, { value, preset: body.match(/^Default: (\S+)\.$/m)?.[1],
            live: /^Changes with a reload\.$/m.test(body) });
    }
    return all;
}

// Rows like | `--max-clients N` | 256 | connections at a time |; a dash for no
// default.
function fromReadme() {
    const all = new Map();
    for (const [, name, value = '', preset] of read('README.md').matchAll(
        /^\| `--([a-z-]+)(?: ([^`]+))?` *\| *`?(.*?)`? *\|/gm))
        all.set(name, { value, preset: preset === '-' ? undefined : preset });
    return all;
}

// ----- the comparison

const help = fromHelp();
const text = read(manual);
const man = fromManual(text);
const readme = fromReadme();
const source = read('collabd.c');
const rows = [...source.matchAll(
    /^ {4}X\(\w+, +(\w+), .*?, +(START|LIVE), +"/gm)];

if (help.size === 0 || rows.length === 0 || readme.size === 0)
    fault('no settings found in --help, collabd.c or README.md: has a table ' +
        'changed its form?');

function compare(where, said, name) {
    const right = help.get(name);
    for (const [what, field] of [['value', 'value'], ['default', 'preset']])
        if (said[field] !== right[field])
            fault(`${where}: --${name} has the ${what} ` +
                `"${said[field] ?? ''}", --help says "${right[field] ?? ''}"`);
}

for (const name of help.keys())
    if (man.has(name))
        compare(manual, man.get(name), name);
    else
        fault(`${manual}: --${name} is missing`);
for (const name of man.keys())
    if (!help.has(name))
        fault(`${manual}: there is no --${name}`);
for (const [name, said] of readme)
    if (help.has(name))
        compare('README.md', said, name);
    else
        fault(`README.md: there is no --${name}`);

for (const [, field, when] of rows) {
    const name = field.replaceAll('_', '-');
    if (man.has(name) && man.get(name).live !== (when === 'LIVE'))
        fault(`${manual}: --${name} ${when === 'LIVE' ? 'lacks' : 'has'} the ` +
            'line "Changes with a reload."');
}

const table = source.match(/#define CLOSE_REASONS\(X\)[^]*?\n\/\*/)?.[0] ?? '';
const codes = new Set([...table.matchAll(/X\(\w+, +(\d{4}),/g)]
    .map((row) => row[1]));
const listed = new Set([...text.matchAll(/^\.It (\d{4})$/gm)]
    .map((row) => row[1]));
for (const code of new Set([...codes, ...listed]))
    if (!listed.has(code) || !codes.has(code))
        fault(`close code ${code} is not both in ${manual} and in ` +
            'CLOSE_REASONS of collabd.c');

// Flags that prose or examples name.
for (const [where, prose] of [[manual, text.replaceAll('\\-', '-')],
    ['README.md', read('README.md')], ['CHANGELOG', read('CHANGELOG')]])
    for (const [, name] of prose.matchAll(
        /(?:collabd(?: --[a-z-]+[^`\n]*?)*? --|`--|^\.Fl -)([a-z][a-z-]*)/gm))
        if (!help.has(name) && name !== 'name')
            fault(`${where}: there is no --${name}`);

const lint = spawnSync('mandoc', ['-T', 'lint', '-W', 'style', root + manual],
    { encoding: 'utf8' });
if (lint.error === undefined)
    for (const line of lint.stdout.split('\n').filter(Boolean))
        fault(line.replace(/^mandoc: /, '').replace(root, ''));

for (const one of faults)
    console.error(`man: ${one}`);
if (faults.length === 0)
    console.log(`man: ${help.size} settings and actions, ` +
        `${readme.size} of them in the README, agree`);
process.exitCode = faults.length === 0 ? 0 : 1;
