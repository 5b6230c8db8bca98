/** Pictures that come from outside: a file, the clipboard, the camera. Errors are sentences for the user. */

/** A decoded picture of a file. @param {{bytes: number, pixels: number}} limits */
export async function pictureOf(file, limits) {
  const name = file.name || "The picture";
  if (file.size > limits.bytes) {
    throw new Error(`${name} has ${mega(file.size)} MB, the limit is ${mega(limits.bytes)}; save a smaller one.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${name} cannot be read as a picture; give a whole PNG, JPEG, WebP or GIF.`);
  }
  if (bitmap.width * bitmap.height > limits.pixels) {
    bitmap.close();
    throw new Error(`${name} has ${mega(bitmap.width * bitmap.height)} megapixels, the limit is ${mega(limits.pixels)}; `
      + "make it smaller first.");
  }
  return bitmap;
}

function mega(number) {
  return (number / 1e6).toFixed(number < 1e7 ? 1 : 0);
}

/** The first file of a drop or a paste; null where there is none. */
export function fileOf(transfer) {
  return [...(transfer?.files ?? [])][0] ?? null;
}

/** The camera: `frame(video)` is called for every picture of it until `stop()`. */
export class Camera {
  #stream = null;

  get on() {
    return this.#stream !== null;
  }

  async start(frame) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("The browser gives the camera to pages of this machine or of https alone; open the page there.");
    }
    try {
      this.#stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
    } catch (error) {
      throw new Error(error.name === "NotFoundError" ? "There is no camera; drop a picture instead."
        : error.name === "NotAllowedError" ? "The camera was refused; allow it in the address bar, or drop a picture instead."
          : "The camera cannot be opened, perhaps because another program has it; drop a picture instead.");
    }
    const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
    video.srcObject = this.#stream;
    await video.play();
    const next = () => {
      if (!this.#stream) return;
      if (video.videoWidth) frame(video);
      requestAnimationFrame(next);
    };
    next();
  }

  stop() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = null;
  }
}
