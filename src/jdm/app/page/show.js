/** Pictures on the page and in files, and how quickly they come. */

/** Shows pictures in a box, in as many columns as rows. */
export function shown(box, images) {
  const canvases = [...box.querySelectorAll("canvas")];
  while (canvases.length > images.length) canvases.pop().remove();
  while (canvases.length < images.length) canvases.push(box.appendChild(document.createElement("canvas")));
  box.style.setProperty("--columns", columns(images.length));
  images.forEach((image, i) => {
    const canvas = canvases[i];
    if (canvas.width !== image.width) canvas.width = image.width;
    if (canvas.height !== image.height) canvas.height = image.height;
    canvas.getContext("2d", { willReadFrequently: true }).putImageData(image, 0, 0);
  });
}

function columns(count) {
  return Math.ceil(Math.sqrt(count));
}

/** Pictures as rows of a sheet. */
export function columned(images) {
  const across = columns(images.length);
  return Array.from({ length: Math.ceil(images.length / across) }, (_, i) => images.slice(i * across, (i + 1) * across));
}

/** Saves rows of pictures of one size as one PNG file. */
export function saved(rows, name) {
  const { width, height } = rows[0][0];
  const sheet = Object.assign(document.createElement("canvas"), { width: width * rows[0].length, height: height * rows.length });
  const ink = sheet.getContext("2d");
  rows.forEach((row, y) => row.forEach((image, x) => ink.putImageData(image, x * width, y * height)));
  sheet.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }, "image/png");
}

/** The time from the hand to the picture, and pictures a second, over the last second. */
export class Pace {
  #ends = [];

  after(milliseconds) {
    const now = performance.now();
    this.#ends = [...this.#ends.filter((end) => now - end < 1000), now];
    const many = this.#ends.length > 1 ? ` · ${this.#ends.length} a second` : "";
    return `${Math.round(milliseconds)} ms${many}`;
  }
}
