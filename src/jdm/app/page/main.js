/** The page: what is on it becomes a request, the engine's pictures are shown. The engine's contract is in engine.js. */
import { Board } from "./board.js";
import { command, python } from "./commands.js";
import { Busy } from "./engine.js";
import { Camera, fileOf, pictureOf } from "./sources.js";
import { columned, Pace, saved, shown } from "./show.js";

const $ = (id) => document.getElementById(id);
const COLOURS = ["#000000", "#ffffff", "#7a7a7a", "#e5484d", "#f5a524", "#f7d154", "#46a758", "#3e7bfa", "#8e4ec6", "#8d5a3b"];
const BLACK = COLOURS[0];
const FAR = { [BLACK]: "#ffffff" }; // ink for a paper; black on others

const board = new Board($("canvas"), () => { $("hint").hidden = true; changed(); });
const camera = new Camera();
const pace = new Pace();
const strengths = {}; // by model, then by control
let engine = null;
let model = null;
let latest = null; // the newest result
let since = Infinity; // when the oldest change was made that no request has yet; Infinity if there is none
let unseen = Infinity; // the same of the requests that newer ones replaced
let refused = -Infinity; // when the newest error was said: pictures asked for earlier do not replace it
let waiting = 0; // requests without an answer

// The request

function number(id) {
  const { min, max, valueAsNumber } = $(id);
  return Number.isFinite(valueAsNumber) ? Math.min(+max, Math.max(+min, Math.floor(valueAsNumber))) : +min;
}

function prompt() {
  const words = $("prompt").value.trim();
  return (model.page.styles?.[$("style").value] ?? "{prompt}").replaceAll("{prompt}", () => words);
}

function request() {
  return {
    model: model.name,
    prompt: prompt(),
    seed: number("seed"),
    toSeed: number("to-seed"),
    blend: +$("blend").value,
    n: number("n"),
    strengths: { ...strengths[model.name] },
    picture: model.controls.length ? board.pixels() : null,
    asMap: $("as-map")?.getAttribute("aria-pressed") === "true",
  };
}

/** Something is another: at the next frame of the screen the engine is asked again. */
function changed() {
  if (!engine) return;
  if (since === Infinity) requestAnimationFrame(follow);
  since = Math.min(since, performance.now());
  busy();
}

function busy() {
  $("pictures").ariaBusy = since < Infinity || waiting > 0;
}

async function follow() {
  waiting++;
  await draw();
  waiting--;
  busy();
}

async function draw() {
  const asked = request();
  const from = since;
  since = Infinity;
  if (asked.prompt.length > engine.limits.prompt) {
    return say(`The words may have ${engine.limits.prompt.toLocaleString()} characters, there are `
      + `${asked.prompt.length.toLocaleString()}; shorten them.`, true);
  }
  try {
    const result = await engine.draw(asked);
    if (result === null) {
      unseen = Math.min(unseen, from);
    } else if (asked.model === model.name) {
      latest = { asked, result };
      show(result);
      drawn(Math.min(unseen, from));
      if (from > refused) say(result.notes[0] ?? "");
    }
  } catch (error) {
    say(error.message, true);
    if (error instanceof Busy) setTimeout(changed, 1000 * error.seconds);
  }
}

/** Says how long it took from the change to its picture; tests and benchmarks listen to the event. */
function drawn(from) {
  const milliseconds = performance.now() - from;
  unseen = Infinity;
  $("pace").textContent = pace.after(milliseconds);
  document.dispatchEvent(new CustomEvent("drawn", { detail: { milliseconds } }));
}

function say(text, isError = false) {
  if (isError) refused = performance.now();
  if ($("notice").textContent !== text) $("notice").textContent = text;
  $("notice").classList.toggle("error", isError);
}

// What is shown

function show(result) {
  shown($("pictures"), result.images);
  for (const box of document.querySelectorAll(".control")) {
    const map = result.maps.find(({ label }) => label === box.dataset.label);
    if (map) shown(box, [map.image]);
    box.classList.toggle("off", !map);
  }
}

async function compare() {
  const asked = request();
  $("compare").disabled = true;
  $("compare").textContent = `Drawing in ${model.compare.steps} steps …`;
  try {
    const slow = await engine.compare(asked);
    const quick = latest.result;
    shown($("quick"), quick.images);
    shown($("slow"), slow.images);
    const times = slow.milliseconds / quick.milliseconds;
    said("quick-said", quick, model.name, times > 1.5 ? `, ${Math.round(times)} times faster` : "");
    said("slow-said", slow, model.compare.name, "");
    $("both").showModal();
  } catch (error) {
    say(error.message, true);
  }
  $("compare").disabled = false;
  compareLabel();
}

function said(id, { steps, milliseconds }, name, more) {
  const time = Object.assign(document.createElement("b"), { textContent: seconds(milliseconds) });
  $(id).replaceChildren(time, `${name}, ${steps === 1 ? "one step" : `${steps} steps`}${more}`);
}

function seconds(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}

function compareLabel() {
  $("compare").hidden = !model.compare;
  if (model.compare) $("compare").textContent = `Compare with ${model.compare.steps} steps`;
}

// Models, controls, colours

function choose(name) {
  model = engine.models.find((each) => each.name === name) ?? engine.models[0];
  const { page, controls } = model;
  const paper = page.paper ?? (controls[0]?.hand ? BLACK : "#ffffff");
  strengths[model.name] ??= Object.fromEntries(controls.map((control, i) => [control.model, i ? 0 : 1]));
  board.fit(model.width, model.height, paper);
  ink(page.ink ?? FAR[paper] ?? "#000000");
  document.documentElement.style.setProperty("--aspect", model.width / model.height);
  document.documentElement.classList.toggle("sharp", $("sharp").getAttribute("aria-pressed") === "true");
  $("no-canvas").hidden = controls.length > 0;
  options($("style"), ["none", ...Object.keys(page.styles ?? {})]);
  $("style-row").hidden = !page.styles;
  $("prompts").replaceChildren(...(page.prompts ?? []).map((value) => Object.assign(new Option(), { value })));
  if (!$("prompt").value) $("prompt").value = page.prompts?.[0] ?? "";
  $("controls").replaceChildren(...controls.map(slider), ...(controls.length ? [asMap(controls[0], paper)] : []));
  compareLabel();
  changed();
}

function options(select, names) {
  select.replaceChildren(...names.map((name) => new Option(name)));
}

function slider(control) {
  const box = document.createElement("label");
  box.className = "control";
  box.dataset.label = control.label;
  box.title = `How much the ${control.label} map of the drawing counts`;
  const value = strengths[model.name][control.model];
  const range = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 2, step: 0.05, value });
  range.name = control.model;
  range.ariaLabel = `Strength of ${control.label}`;
  const output = document.createElement("output");
  const set = () => {
    strengths[model.name][control.model] = +range.value;
    output.textContent = (+range.value).toFixed(2);
    changed();
  };
  range.addEventListener("input", set);
  output.textContent = (+range.value).toFixed(2);
  const words = document.createElement("div");
  const line = document.createElement("span");
  line.append(Object.assign(document.createElement("b"), { textContent: control.label }), " ", output);
  words.append(line, range);
  box.append(document.createElement("canvas"), words);
  return box;
}

/** The button for it; pressed at the start where people draw the map, and the paper is a map's. */
function asMap(control, paper) {
  const button = Object.assign(document.createElement("button"), { id: "as-map", className: "quiet", type: "button" });
  button.textContent = "Draw the map itself";
  button.title = `What is drawn is taken as the ${control.label} map, and nothing is measured on it`;
  pressed(button, control.hand && paper === BLACK);
  button.addEventListener("click", () => toggle(button) || changed());
  return button;
}

function toggle(button) {
  button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
}

function pressed(button, value) {
  button.setAttribute("aria-pressed", value);
}

function ink(colour) {
  board.colour = $("colour").value = colour;
  tool("brush");
  for (const each of $("colours").children) pressed(each, each.dataset.colour === colour);
}

function tool(name) {
  board.tool = name;
  for (const each of ["brush", "eraser"]) pressed($(each), each === name);
}

function swatch(colour) {
  const button = Object.assign(document.createElement("button"), { title: colour, type: "button" });
  button.dataset.colour = colour;
  button.style.setProperty("--is", colour);
  button.setAttribute("aria-label", `Colour ${colour}`);
  button.addEventListener("click", () => ink(colour));
  return button;
}

// Pictures from outside

async function take(file) {
  if (!file) return;
  if (!model.controls.length) return say("This model takes no drawing; choose another to use a picture.", true);
  try {
    stopCamera();
    const picture = await pictureOf(file, engine.limits);
    measured();
    board.place(picture, picture.width, picture.height);
    picture.close();
  } catch (error) {
    say(error.message, true);
  }
}

/** A picture from outside is no map that somebody drew. */
function measured() {
  if (model.controls[0]?.hand) pressed($("as-map"), false);
}

async function toggleCamera() {
  if (camera.on) return stopCamera();
  try {
    board.keep();
    await camera.start((video) => board.place(video, video.videoWidth, video.videoHeight, { keep: false, mirrored: true }));
    measured();
    pressed($("camera"), true);
  } catch (error) {
    say(error.message, true);
  }
}

function stopCamera() {
  camera.stop();
  pressed($("camera"), false);
}

// Seeds

function another() {
  $("seed").value = Math.floor(Math.random() * 1e6);
  changed();
}

let moving = 0; // the start of the movement, 0 while it stands
function play() {
  moving = moving ? 0 : performance.now() - 3000 * Math.acos(1 - 2 * $("blend").value) / Math.PI;
  pressed($("play"), moving > 0);
  if (moving) requestAnimationFrame(move);
}

function move(now) {
  if (!moving) return;
  $("blend").value = (1 - Math.cos(((now - moving) / 3000) * Math.PI)) / 2;
  changed();
  requestAnimationFrame(move);
}

// Wiring

function wire() {
  $("colours").append(...COLOURS.map(swatch));
  for (const id of ["prompt", "style", "seed", "to-seed", "blend", "n"]) $(id).addEventListener("input", changed);
  $("model").addEventListener("input", () => choose($("model").value));
  $("size").addEventListener("input", () => { board.width = +$("size").value; });
  $("colour").addEventListener("input", () => ink($("colour").value));
  const clicks = {
    brush: () => tool("brush"), eraser: () => tool("eraser"), undo: () => board.undo(), redo: () => board.redo(),
    clear: () => board.clear(), file: () => $("chosen").click(), camera: toggleCamera, dice: another, play, compare,
    save: () => latest && saved(columned(latest.result.images), "picture.png"), code: showCode,
    "save-drawing": () => saved([[latest.asked.picture]], "drawing.png"),
    sharp: () => { toggle($("sharp")); document.documentElement.classList.toggle("sharp"); },
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
  $("chosen").addEventListener("change", () => { take($("chosen").files[0]); $("chosen").value = ""; });
  $("canvas").addEventListener("cursor", ({ detail }) => pen(detail));
  $("canvas").addEventListener("blur", () => { $("pen").hidden = true; });
  addEventListener("dragover", (event) => { event.preventDefault(); $("sheet").classList.add("target"); });
  addEventListener("dragleave", () => $("sheet").classList.remove("target"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("sheet").classList.remove("target");
    take(fileOf(event.dataTransfer));
  });
  addEventListener("paste", (event) => take(fileOf(event.clipboardData)));
  addEventListener("keydown", keys);
}

function pen({ x, y, down }) {
  $("pen").hidden = false;
  $("pen").classList.toggle("down", down);
  $("pen").style.left = `${(100 * x) / $("canvas").width}%`;
  $("pen").style.top = `${(100 * y) / $("canvas").height}%`;
}

function keys(event) {
  if (event.target.matches("input[type=text], input[type=number], select, pre") || document.querySelector("dialog[open]")) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    return key === "y" || event.shiftKey ? board.redo() : board.undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const resized = { "[": 1 / 1.25, "]": 1.25 }[key];
  if (resized) {
    $("size").value = resized * $("size").value + (resized > 1 ? 1 : -1);
    board.width = +$("size").value;
  }
  ({ b: () => tool("brush"), e: () => tool("eraser"), n: another, p: play, s: () => $("save").click(),
    "/": () => { event.preventDefault(); $("prompt").select(); } })[key]?.();
}

function showCode() {
  if (!latest) return;
  $("shell").textContent = command(latest.asked, model, engine.device);
  $("python").textContent = python(latest.asked, model, engine.device);
  $("needs-drawing").hidden = !model.controls.length;
  $("sources").showModal();
}

async function copy(button) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source);
    button.textContent = "Selected: press Ctrl C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

async function start() {
  wire();
  board.width = +$("size").value;
  say("Loading …");
  try {
    const { open } = await import(document.querySelector("meta[name=engine]").content);
    engine = await open((share) => say(`Loading … ${Math.round(100 * share)}%`));
  } catch (error) {
    return say(error.message, true);
  }
  engine.onstate((message) => (message ? say(message, true) : changed()));
  options($("model"), engine.models.map(({ name }) => name));
  $("model-row").hidden = engine.models.length < 2;
  $("n").max = engine.limits.pictures;
  choose(engine.models[0].name);
}

start();
