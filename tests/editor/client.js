// Recipes in an editor: yaml-language-server over stdio against the committed schema.
// Prints what failed, then `N passed, N failed`.
'use strict';
const { spawn } = require('child_process');
const fs = require('fs');
const path = require('path');
const { pathToFileURL } = require('url');
const rpc = require('vscode-jsonrpc/node');

const RECIPES = path.resolve(__dirname, '../../recipes');
const SCHEMA = path.join(RECIPES, 'recipe.schema.json');
const SERVER = path.join(__dirname, 'node_modules/yaml-language-server/bin/yaml-language-server');
// A server that says nothing for this long is broken; how fast it answers is not measured.
const PATIENCE_MS = 60_000;

class Editor {
  #server = spawn(process.execPath, [SERVER, '--stdio'], { stdio: ['pipe', 'pipe', 'inherit'] });
  #connection = rpc.createMessageConnection(
    new rpc.StreamMessageReader(this.#server.stdout),
    new rpc.StreamMessageWriter(this.#server.stdin),
  );
  #waiting = new Map();
  #opened = 0;

  async start() {
    const settings = { validate: true, hover: true, completion: true, schemaStore: { enable: false } };
    this.#connection.onRequest('workspace/configuration', ({ items }) =>
      items.map(({ section }) => (section === 'yaml' ? settings : {})));
    this.#connection.onRequest('client/registerCapability', () => null);
    this.#connection.onNotification('textDocument/publishDiagnostics', ({ uri, diagnostics }) => {
      this.#waiting.get(uri)?.(diagnostics);
    });
    this.#connection.listen();
    await this.#connection.sendRequest('initialize', {
      processId: process.pid,
      rootUri: pathToFileURL(RECIPES).href,
      capabilities: {
        workspace: { configuration: true },
        textDocument: {
          completion: { completionItem: { snippetSupport: true, documentationFormat: ['markdown', 'plaintext'] } },
          hover: { contentFormat: ['markdown', 'plaintext'] },
        },
      },
    });
    this.#connection.sendNotification('initialized', {});
  }

  // Opens a text as a new file beside the schema, as its modeline expects, and waits for what the server finds.
  async open(text, uri = pathToFileURL(path.join(RECIPES, `opened_${this.#opened++}.yaml`)).href) {
    let timer;
    const answer = new Promise((resolve, reject) => {
      this.#waiting.set(uri, resolve);
      timer = setTimeout(() => reject(new Error(`no diagnostics for ${uri}`)), PATIENCE_MS);
    });
    this.#connection.sendNotification('textDocument/didOpen', {
      textDocument: { uri, languageId: 'yaml', version: 1, text },
    });
    const diagnostics = await answer.finally(() => clearTimeout(timer));
    return { uri, diagnostics };
  }

  // Labels of the completions where `|` stands in a text.
  async complete(marked) {
    const { uri, position } = await this.#mark(marked);
    const answer = await this.#connection.sendRequest('textDocument/completion', { textDocument: { uri }, position });
    return Array.isArray(answer) ? answer : answer.items;
  }

  // What is shown when the pointer rests where `|` stands in a text.
  async hover(marked) {
    const { uri, position } = await this.#mark(marked);
    const answer = await this.#connection.sendRequest('textDocument/hover', { textDocument: { uri }, position });
    const contents = answer?.contents ?? '';
    return typeof contents === 'string' ? contents : contents.value;
  }

  async #mark(marked) {
    const [before, after] = marked.split('|');
    const lines = before.split('\n');
    const { uri } = await this.open(before + after);
    return { uri, position: { line: lines.length - 1, character: lines.at(-1).length } };
  }

  stop() {
    this.#connection.dispose();
    this.#server.kill();
  }
}

const quickstart = fs.readFileSync(path.join(RECIPES, 'quickstart.yaml'), 'utf8');

function edit(from, to) {
  if (!quickstart.includes(from)) throw new Error(`quickstart.yaml no longer has ${JSON.stringify(from)}`);
  return quickstart.replace(from, () => to);
}

// Each one edit of the quickstart: what is replaced, by what, the word that is to be marked, and a part of the message.
const BROKEN = [
  ['    epochs: 12\n', '    epoch: 12\n', 'epoch', /Property epoch is not allowed/],
  ['    epochs: 12\n', '    epochs: many\n', 'many', /expected a number/],
  ['    epochs: 12\n', '    epochs: -1\n', '-1', /below the exclusive minimum of 0\b/],
  ['    epochs: 12\n', '', 'pretrain', /Missing property "epochs"/],
  ['seed: 0\n', 'seed: 0\nsteps: 3\n', 'steps', /Property steps is not allowed/],
  ['type: smooth_l1', 'type: smoth_l1', 'smoth_l1', /smooth_l1/],
  ['type: smooth_l1', 'type: mse, beta: 2', 'beta', /Property beta is not allowed/],
  ['ratio: 0.7', 'ratio: 1.5', '1.5', /above the maximum of 1\b/],
  ['ratio: 0.7', 'ratoi: 0.7', 'ratoi', /Property ratoi is not allowed/],
  ['normalize: whiten', 'normalize: white', 'white', /whiten/],
  ['tokens: [cls, visible]', 'tokens: [cls, seen]', 'seen', /visible/],
  ['batch: { effective: 64 }\n', 'batch: 64\n', '64', /Incorrect type/],
];

// Recipes that extend the quickstart, and what is to be marked in them with which message; nothing for those without mistakes.
const extending = (says) => `${modeline}extends: quickstart\nname: x\nstages:\n${says}`;
const EXTENDING = [
  ['an objective removed', '  pretrain:\n    objectives:\n      align: null\n'],
  ['a stage removed', '  knn: null\n'],
  ['options removed', '  pretrain:\n    epochs: null\n    masker: { ratio: null, visible: 16 }\n    data: { transforms: null }\n'],
  ['a component anew', '  pretrain:\n    masker: { $replace: true, type: random, ratio: 0.5 }\n'],
  ['objectives anew', '  pretrain:\n    objectives:\n      $replace: true\n      more: { weight: 2 }\n'],
  ['stages anew', '  $replace: true\n  knn: { type: knn }\n'],
  ['an option that is none', '  pretrain:\n    masker: { type: random, ratoi: null }\n', 'ratoi', /Property ratoi is not allowed/],
  ['a value out of range', '  pretrain:\n    masker: { type: random, ratio: 2 }\n', '2', /above the maximum of 1\b/],
  ['no objective anew', '  pretrain:\n    objectives:\n      $replace: false\n', 'false', /true/],
  ['a stage of a name that is none', '  a.b:\n    type: knn\n', 'a.b', /./],
];

const modeline = '# yaml-language-server: $schema=./recipe.schema.json\n';
const start = `${modeline}name: x\nstages:\n  pretrain:\n    type: pretrain\n`;
// A text with the place marked, and labels that are offered there.
const COMPLETIONS = [
  ['types of a stage', `${modeline}name: x\nstages:\n  pretrain:\n    type: |\n`, ['pretrain', 'finetune', 'knn']],
  ['options of a stage', `${start}    |\n`, ['epochs', 'data', 'student', 'objectives', 'optimizer', 'batch']],
  ['types of a masker', `${start}    masker:\n      type: |\n`, ['attention', 'random']],
  ['options of a masker', `${start}    masker:\n      type: attention\n      |\n`, ['teacher', 'ratio', 'visible']],
  ['types of a dataset', `${start}    data:\n      dataset:\n        type: |\n`, ['image_folder', 'idx', 'sample']],
  ['options of a dataset', `${start}    data:\n      dataset:\n        type: image_folder\n        |\n`, ['root', 'extensions']],
  ['types of a teacher', `${start}    teachers:\n      clip:\n        type: |\n`, ['clip', 'dino', 'dinov2', 'vit']],
  ['options of a loss', `${start}    objectives:\n      align:\n        loss:\n          type: smooth_l1\n          |\n`, ['beta']],
  ['types of a loss', `${start}    objectives:\n      align:\n        loss:\n          type: |\n`, ['mse', 'smooth_l1', 'cosine']],
  ['options of an aligner', `${start}    objectives:\n      align:\n        aligner:\n          type: dynamic\n          |\n`, ['fusion', 'head']],
  ['names beside an objective', `${modeline}extends: quickstart\nstages:\n  pretrain:\n    objectives:\n      |\n`, ['$replace']],
  ['options of an inherited masker', `${modeline}extends: quickstart\nstages:\n  pretrain:\n    masker:\n      |\n`, ['type', 'ratio', '$replace']],
  ['options of another masker', `${modeline}extends: quickstart\nstages:\n  pretrain:\n    masker:\n      type: block\n      |\n`, ['masked', '$replace']],
  ['options of an objective', `${modeline}extends: quickstart\nstages:\n  pretrain:\n    objectives:\n      more:\n        |\n`, ['target', 'tokens', '$replace']],
  ['values of an option', `${start}    objectives:\n      align:\n        aligner:\n          type: dynamic\n          fusion: |\n`, ['linear', 'simple', 'sum']],
];

// Labels that belong to other components and must not be offered.
const FOREIGN = { 'options of a loss': ['fusion', 'teacher'], 'options of a masker': ['root', 'beta'] };

const HOVERS = [
  ['an option', `${start}    ep|ochs: 3\n`, /Epochs to train for/],
  ['an option of a component', `${start}    masker:\n      type: attention\n      rat|io: 0.7\n      teacher: t\n`, /Share of the patches that is masked/],
  ['what starts anew', `${modeline}extends: quickstart\nstages:\n  pretrain:\n    objectives:\n      $repl|ace: true\n`, /nothing that is inherited/],
  ['an option of a recipe that extends', `${modeline}extends: quickstart\nstages:\n  pretrain:\n    ep|ochs: null\n`, /Epochs to train for/],
  ['a component', `${start}    masker:\n      type: atten|tion\n      teacher: t\n`, /keeps patches that the teacher attends to/],
];

async function main() {
  const checks = [];
  const check = (name, run) => checks.push({ name, run });
  const editor = new Editor();
  await editor.start();

  for (const file of fs.readdirSync(RECIPES).filter((name) => name.endsWith('.yaml')).sort()) {
    check(`${file} has no diagnostics`, async () => {
      const target = path.join(RECIPES, file);
      const { diagnostics } = await editor.open(fs.readFileSync(target, 'utf8'), pathToFileURL(target).href);
      if (diagnostics.length) throw new Error(JSON.stringify(diagnostics));
    });
  }
  for (const [from, to, word, message] of BROKEN) {
    check(`${JSON.stringify(to || `no ${from}`)} is marked`, async () => {
      const text = edit(from, to);
      const { diagnostics } = await editor.open(text);
      const lines = text.split('\n');
      const marked = ({ range: { start, end } }) =>
        start.line === end.line ? lines[start.line].slice(start.character, end.character) : lines[start.line].slice(start.character);
      const right = diagnostics.some((found) => marked(found).includes(word) && message.test(found.message));
      if (!right) throw new Error(JSON.stringify(diagnostics.map((found) => [marked(found), found.message])));
      // One mistake is not buried under messages about every other component.
      if (diagnostics.length > 2) throw new Error(`${diagnostics.length} diagnostics for one mistake: ${JSON.stringify(diagnostics.map((found) => [marked(found), found.message]))}`);
    });
  }
  for (const [name, says, word, message] of EXTENDING) {
    check(`${name} is ${word ? 'marked' : 'no mistake'}`, async () => {
      const text = extending(says);
      const { diagnostics } = await editor.open(text);
      const lines = text.split('\n');
      const marked = ({ range: { start, end } }) => lines[start.line].slice(start.character, start.line === end.line ? end.character : undefined);
      const shown = JSON.stringify(diagnostics.map((found) => [marked(found), found.message]));
      const right = word
        ? diagnostics.some((found) => marked(found).includes(word) && message.test(found.message)) && diagnostics.length <= 2
        : !diagnostics.length;
      if (!right) throw new Error(shown);
    });
  }
  for (const [name, marked, labels] of COMPLETIONS) {
    check(`completion offers the ${name}`, async () => {
      const offered = (await editor.complete(marked)).map(({ label }) => label);
      const missing = labels.filter((label) => !offered.includes(label));
      const foreign = (FOREIGN[name] ?? []).filter((label) => offered.includes(label));
      if (missing.length || foreign.length) {
        throw new Error(`offered ${offered.join(', ')}; missing ${missing.join(', ') || 'none'}; foreign ${foreign.join(', ') || 'none'}`);
      }
    });
  }
  for (const [name, marked, expected] of HOVERS) {
    check(`hover describes ${name}`, async () => {
      const shown = await editor.hover(marked);
      if (!expected.test(shown)) throw new Error(`shown: ${JSON.stringify(shown)}`);
    });
  }

  let failed = 0;
  for (const { name, run } of checks) {
    try {
      await run();
    } catch (error) {
      failed += 1;
      console.error(`FAILED ${name}\n  ${error.message}`);
    }
  }
  editor.stop();
  console.log(`${checks.length - failed} passed, ${failed} failed`);
  process.exitCode = failed ? 1 : 0;
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
