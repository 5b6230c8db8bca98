/** The worker of browser.js: loads what models.json names, once, and draws with it. */
import * as ort from "./onnxruntime.js";
import { canny } from "./canny.js";
import { bytesOf, imageOf } from "./engine.js";
import { blended, fresh } from "./noise.js";
import { strokes } from "./strokes.js";
import { Tokenizer } from "./tokenizer.js";

// Measurements of RGBA pixels -> [H, W] in [0, 1], of controls that have no graph.
const SCRIPTS = {
  canny: (picture, { low_threshold: low, high_threshold: high, picture: of }) =>
    Float32Array.from(canny(picture, { low, high, grey: of.startsWith("grey") }), (edge) => edge / 255),
  strokes,
};
const REMEMBERED = 64; // prompts whose states are kept

const files = new Map(); // contents by name, until they are used
const sessions = new Map(); // by the name of the graph's file
const tokenizers = new Map(); // by the name of its file
const states = new Map(); // of prompts, the latest last
let models = [];

onmessage = async ({ data: { id, name, argument } }) => {
  try {
    postMessage({ id, value: await { load, draw }[name](argument) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
};

// Loading

async function load(address) {
  const { files: sizes, runtime, ...found } = await (await fetched(address)).json();
  const total = Object.values(sizes).reduce((sum, size) => sum + size);
  let done = 0;
  for (const name of Object.keys(sizes)) {
    const { body } = await fetched(new URL(name, address));
    const parts = [];
    for (const reader = body.getReader(); ;) {
      const { done: ended, value } = await reader.read();
      if (ended) break;
      parts.push(value);
      done += value.length;
      postMessage({ share: Math.min(1, done / total) });
    }
    files.set(name, await new Blob(parts).arrayBuffer());
  }
  ort.env.wasm.wasmBinary = await unpacked(taken(runtime));
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  models = found.models;
  await prepared(models[0]);
  return { ...found, models: models.map(({ graphs, ...model }) => model) };
}

async function fetched(address) {
  let answer;
  try {
    answer = await fetch(address);
  } catch {
    throw new Error("A part of this page could not be loaded; check the network, then reload it.");
  }
  if (!answer.ok) throw new Error(`${new URL(address).pathname} is missing here (${answer.status}); put the whole folder on the host.`);
  return answer;
}

function taken(name) {
  const content = files.get(name);
  files.delete(name);
  return content;
}

/** Unpacks a gzip, unless the host had the browser do that already. */
async function unpacked(content) {
  const [first, second] = new Uint8Array(content, 0, 2);
  if (first !== 0x1f || second !== 0x8b) return content;
  return new Response(new Blob([content]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function session(name) {
  if (!sessions.has(name)) {
    sessions.set(name, await ort.InferenceSession.create(new Uint8Array(taken(name)), { executionProviders: ["wasm"] }));
  }
  return sessions.get(name);
}

/** Everything that a model's first picture needs. */
async function prepared({ graphs }) {
  const own = Object.values(graphs.controls).slice(0, 1).flatMap(({ controlnet, graph }) => [controlnet, graph]);
  for (const name of [graphs.text_encoder, graphs.unet, graphs.decoder, ...own]) if (name) await session(name);
}

// Drawing

async function draw(request) {
  const model = models.find(({ name }) => name === request.model);
  const start = performance.now();
  const used = request.picture ? usedControls(model, request) : [];
  const maps = [];
  for (const { model: name } of used) maps.push(await mapOf(model.graphs.controls[name], request));
  const x = await sampled(model, request, used, maps);
  const { images } = await run(model.graphs.decoder, { x });
  const milliseconds = performance.now() - start;
  return {
    images: pictures(images.data, model.width, model.height),
    maps: used.map(({ label }, i) => ({ label, image: pictures(maps[i], model.width, model.height)[0] })),
    milliseconds,
    steps: model.steps,
    notes: notes(model, request),
  };
}

function usedControls({ controls }, { strengths, asMap }) {
  return controls.filter(({ model }, i) => i === 0 || (!asMap && strengths[model] > 0));
}

/** The map [3, H, W] of the drawing, in [0, 1]. */
async function mapOf({ graph, script, settings }, { picture, asMap }) {
  const { width, height } = picture;
  if (asMap) return planes(picture);
  if (graph) return (await run(graph, { images: tensor(planes(picture), [1, 3, height, width]) })).map.data;
  return repeated(SCRIPTS[script](picture, settings), 3);
}

/** x [n, C, h, w], in model space. */
async function sampled({ graphs, width, height }, request, used, maps) {
  const { n, seed, strengths, prompt } = request;
  const count = graphs.latents.reduce((product, side) => product * side);
  const told = rows(await read(graphs, prompt), n);
  const shape = [n, ...graphs.latents];
  let x = tensor(blended(n, count, request), shape);
  for (const [k, { alpha, sigma }] of graphs.steps.entries()) {
    if (k > 0) {
      const noise = fresh(n, count, seed, k);
      x = tensor(x.data.map((value, i) => alpha * value + sigma * noise[i]), shape);
    }
    const given = { x_t: x, ...told, ...(graphs.steps.length > 1 ? { step: whole([k]) } : {}) };
    const residuals = {};
    for (const [i, { model }] of used.entries()) {
      const map = tensor(repeated(maps[i], n), [n, 3, height, width]);
      const strength = tensor(Float32Array.of(strengths[model] ?? 1), []);
      added(residuals, await run(graphs.controls[model].controlnet, { ...given, map, strength }));
    }
    x = (await run(graphs.unet, { ...given, ...residuals })).x;
  }
  return x;
}

/** What the text encoder makes of a prompt, one row each. */
async function read(graphs, prompt) {
  const key = `${graphs.text_encoder} ${prompt}`;
  const known = states.get(key) ?? await encoded(graphs, prompt);
  states.delete(key);
  states.set(key, known);
  if (states.size > REMEMBERED) states.delete(states.keys().next().value);
  return known;
}

async function encoded(graphs, prompt) {
  const ids = graphs.tokenizers.map((name) => tokenizer(name).ids(prompt));
  const given = Object.fromEntries(ids.map((row, i) => [i ? `ids_${i + 1}` : "ids", whole(row, [1, row.length])]));
  const found = await run(graphs.text_encoder, given);
  if (graphs.zeros && !prompt) for (const { data } of Object.values(found)) data.fill(0);
  return found;
}

function tokenizer(name) {
  if (!tokenizers.has(name)) tokenizers.set(name, new Tokenizer(JSON.parse(new TextDecoder().decode(taken(name)))));
  return tokenizers.get(name);
}

function notes({ graphs }, { picture, prompt }) {
  const found = [];
  const colours = picture && new Uint32Array(picture.data.buffer);
  if (colours?.every((colour) => colour === colours[0])) {
    found.push("The drawing is empty, so it says nothing: the picture follows the prompt alone.");
  }
  const unread = graphs.tokenizers.map((name) => tokenizer(name).unread(prompt)).find(Boolean);
  if (unread) found.push(`The prompt is long: the model does not read '${unread.slice(0, 100)}', its end.`);
  return found;
}

// Tensors

async function run(name, given) {
  return (await session(name)).run(given);
}

function tensor(data, shape) {
  return new ort.Tensor("float32", data, shape);
}

function whole(numbers, shape = [numbers.length]) {
  return new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);
}

/** Tensors of one row as tensors of n equal rows. */
function rows(tensors, n) {
  return Object.fromEntries(Object.entries(tensors).map(([name, { data, dims }]) =>
    [name, tensor(repeated(data, n), [n, ...dims.slice(1)])]));
}

function repeated(data, n) {
  const all = new Float32Array(n * data.length);
  for (let i = 0; i < n; i++) all.set(data, i * data.length);
  return all;
}

/** Adds tensors to those of the same name, in place; a name that is new is taken over. */
function added(sums, more) {
  for (const [name, { data, dims }] of Object.entries(more)) {
    if (!sums[name]) sums[name] = tensor(data, dims);
    else sums[name].data.forEach((value, i, own) => { own[i] = value + data[i]; });
  }
}

/** RGBA pixels as [3, H, W] in [0, 1]. */
function planes(picture) {
  const bytes = bytesOf(picture);
  const size = bytes.length / 3;
  return Float32Array.from({ length: bytes.length }, (_, i) => bytes[3 * (i % size) + Math.floor(i / size)] / 255);
}

/** [n, 3, H, W] in [0, 1] as n pictures. */
function pictures(data, width, height) {
  const size = width * height;
  return Array.from({ length: data.length / (3 * size) }, (_, n) => {
    const bytes = new Uint8ClampedArray(3 * size); // rounds and clamps
    for (let i = 0; i < bytes.length; i++) bytes[i] = 255 * data[3 * size * n + (i % 3) * size + Math.floor(i / 3)];
    return imageOf(bytes, width, height);
  });
}
