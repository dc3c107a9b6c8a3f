// SPDX-License-Identifier: Apache-2.0
// Runs a folder in transformers.js on the WASM runtime of ONNX Runtime; prints the outputs for each dtype as JSON.
//     node transformers_js.mjs NODE_MODULES FOLDER '{"Auto": "AutoModel", "texts": [...], "dtypes": [...]}'
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, folder, asked] = process.argv.slice(2);
const require = createRequire(path.join(path.resolve(modules), 'here.js'));
const runtime = require.resolve('onnxruntime-web/wasm').replace(/[^/]*$/, 'ort.wasm.bundle.min.mjs');
const ort = await import(pathToFileURL(runtime).href);
ort.env.wasm.numThreads = 1;
// In node transformers.js takes native code unless it is given a runtime; of files it hands over paths, which WASM cannot open.
const create = (file, options) =>
  ort.InferenceSession.create(typeof file === 'string' ? fs.readFileSync(file) : file, options);
globalThis[Symbol.for('onnxruntime')] = { ...ort, InferenceSession: { create } };
const entry = path.join(path.resolve(modules), '@huggingface', 'transformers', 'dist', 'transformers.node.mjs');
const transformers = await import(pathToFileURL(entry).href);
Object.assign(transformers.env, { allowRemoteModels: false, localModelPath: path.dirname(folder) + '/', useWasmCache: false });
ort.env.wasm.wasmPaths = pathToFileURL(path.dirname(runtime)).href + '/';

const { Auto, texts, dtypes } = JSON.parse(asked);
const name = path.basename(folder);
const tokenizer = await transformers.AutoTokenizer.from_pretrained(name);
const found = {};
for (const dtype of dtypes) {
  const model = await transformers[Auto].from_pretrained(name, { dtype, device: 'auto' });
  const outputs = await model(await tokenizer(texts, { padding: true }));
  found[dtype] = Object.fromEntries(Object.entries(outputs).map(([key, value]) => [key, value.tolist()]));
}
console.log(JSON.stringify(found));
