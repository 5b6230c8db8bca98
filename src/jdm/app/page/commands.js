/** The request on the page as `jdm sample` and as Python: both draw the same picture. */

const DRAWING = "drawing.png";

/** What both spell: the model, its further controls with their strengths, and the starting noise. */
function parts(request, model) {
  const [own, ...others] = model.controls;
  const also = request.asMap ? [] : others.filter(({ model: name }) => request.strengths[name] > 0);
  const used = own ? [own, ...also] : [];
  const strengths = used.map(({ model: name }) => request.strengths[name] ?? 1);
  return {
    also,
    spec: own?.spec ?? null,
    strengths: strengths.every((strength) => strength === 1) ? [] : strengths,
    blended: request.blend > 0,
  };
}

/** A shell command. @param {import("./engine.js").Request} request */
export function command(request, model, device = "cpu") {
  const { also, spec, strengths, blended } = parts(request, model);
  return [
    `jdm sample ${quoted(model.name)} --prompt=${quoted(request.prompt)}`,
    model.controls.length ? ` --${request.asMap ? "control-map" : "image"} ${DRAWING}` : "",
    spec && !request.asMap ? ` --control ${quoted(spec)}` : "",
    ...also.map(({ model: name }) => ` --also ${quoted(name)}`),
    ...strengths.map((strength) => ` --strength ${strength}`),
    ` --n ${request.n} --seed ${request.seed}`,
    blended ? ` --to-seed ${request.toSeed} --blend ${request.blend}` : "",
    device === "cpu" ? "" : ` --device ${quoted(device)}`,
    " --out pictures",
  ].join("");
}

/** A Python program; `images` are uint8 [n, 3, H, W]. */
export function python(request, model, device = "cpu") {
  const { also, spec, strengths, blended } = parts(request, model);
  const drawn = model.controls.length > 0;
  const size = model.width === model.height ? model.width : `(${model.height}, ${model.width})`;
  const loaded = device === "cpu" ? text(model.name) : `load_model(${text(model.name)}).to(${text(device)})`;
  const made = [
    loaded,
    ...(spec && !request.asMap ? [`load_control(${text(spec)})`] : []),
    ...(also.length ? [`also=[${also.map(({ model: name }) => text(name)).join(", ")}]`] : []),
    ...(strengths.length ? [`strengths=[${strengths.join(", ")}]`] : []),
  ];
  const given = [
    text(request.prompt),
    ...(drawn ? [`${request.asMap ? "control_map=" : "image="}load_picture("${DRAWING}", ${size})`] : []),
    `n=${request.n}`,
    `seed=${request.seed}`,
    ...(blended ? [`to_seed=${request.toSeed}`, `blend=${request.blend}`] : []),
  ];
  return [
    ...(spec && !request.asMap ? ["from jdm.controls import load_control"] : []),
    drawn ? "from jdm.data.pictures import load_picture, save_pictures" : "from jdm.data.pictures import save_pictures",
    "from jdm.evaluation.sampling import generator",
    ...(device === "cpu" ? [] : ["from jdm.library import load_model"]),
    "",
    `draw = generator(${made.join(", ")})`,
    `images = draw(${given.join(", ")})`,
    'save_pictures(images, "pictures")',
  ].join("\n");
}

function quoted(word) {
  return /^[\w./:@%+=,-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

function text(value) {
  return JSON.stringify(value);
}
