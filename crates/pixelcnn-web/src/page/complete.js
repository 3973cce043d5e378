// Complete: a picture of which a part is missing, filled in in several ways.

import { Picture, ask, base64, bytes, chooser, chosenClass, classes, element, models, sliders, work } from './common.js';
import { draw } from './draw.js';

const section = document.getElementById('complete');
const form = section.querySelector('form');
const canvas = section.querySelector('.work .picture');
const { run, say, reset } = work(section);

/** Pixels of a picture that is completed here: larger ones take long. */
const MOST = 128 * 128;

/** The picture: what to send, its pixels, and which of them are painted over. */
let picture = null;

function start() {
  sliders(form);
  chooser(section.querySelector('.drop'), ([file]) => open(file));
  section.querySelector('.own').addEventListener('click', own);
  section.querySelector('.clear').addEventListener('click', () => {
    picture?.painted.fill(0);
    show();
  });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    go();
  });
  form.elements.row.addEventListener('input', () => {
    form.elements.how.value = 'cut';
    show();
  });
  form.querySelectorAll('[name=how]').forEach((radio) => radio.addEventListener('change', show));
  let painting = false;
  canvas.addEventListener('pointerdown', (event) => {
    painting = true;
    canvas.setPointerCapture(event.pointerId);
    brush(event);
  });
  canvas.addEventListener('pointermove', (event) => painting && brush(event));
  canvas.addEventListener('pointerup', () => (painting = false));
  canvas.addEventListener('pointercancel', () => (painting = false));
}

async function open(file) {
  try {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
    const { width, height } = bitmap;
    if (width * height <= MOST) {
      take(bitmap, width, height, { picture: await base64(file) });
    } else {
      const by = Math.sqrt(MOST / (width * height));
      const small = element('canvas', { width: Math.max(Math.floor(width * by), 1), height: Math.max(Math.floor(height * by), 1) });
      const context = small.getContext('2d');
      context.imageSmoothingQuality = 'high';
      context.drawImage(bitmap, 0, 0, small.width, small.height);
      const blob = await new Promise((done) => small.toBlob(done, 'image/png'));
      take(small, small.width, small.height, { picture: await base64(blob) }, `, shrunk from ${width}x${height}: it is drawn pixel by pixel`);
    }
    say('');
  } catch {
    say(`${file.name} cannot be shown here: PNG, JPEG, WebP, GIF and BMP can.`, true);
  }
}

function own() {
  const { height, width, channels, name } = models.chosen;
  const request = { model: name, seed: Math.floor(Math.random() * 2 ** 31), class: chosenClass(form) };
  run(async (signal, tell) => {
    const drawn = new Picture(height, width, channels);
    await ask('v1/sample', { ...request, format: 'levels' }, (event, data) => {
      if (event === 'rows') drawn.row(data.row, bytes(data.rows[0]));
    }, signal);
    take(drawn.canvas, width, height, { levels: drawn.nested });
    tell('');
  });
}

function take(source, width, height, image, how = '') {
  picture = { channels: models.chosen.channels, image, width, height, source, painted: new Uint8Array(width * height) };
  section.querySelector('.work').hidden = false;
  section.querySelector('.size').textContent = `${width}x${height} pixels${how}`;
  form.elements.row.max = height - 1;
  form.elements.row.value = Math.floor(height / 2);
  canvas.width = width;
  canvas.height = height;
  show();
}

/** Which pixels are missing. */
function missing() {
  const { width, height, painted } = picture;
  if (form.elements.how.value === 'paint') return painted;
  const row = Number(form.elements.row.value);
  return Uint8Array.from({ length: width * height }, (_, i) => (i >= row * width ? 1 : 0));
}

function show() {
  if (!picture) return;
  const { width, height, source } = picture;
  const context = canvas.getContext('2d');
  context.drawImage(source, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  missing().forEach((gone, i) => {
    // A pattern that no picture has much of.
    const level = (i + Math.floor(i / width)) % 2 ? 150 : 110;
    if (gone) pixels.data.set([level, level, level, 255], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

function brush(event) {
  if (!picture) return;
  form.elements.how.value = 'paint';
  const { width, height, painted } = picture;
  const box = canvas.getBoundingClientRect();
  const [cy, cx] = [((event.clientY - box.top) / box.height) * height, ((event.clientX - box.left) / box.width) * width];
  const radius = Number(form.elements.brush.value) / 2;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (Math.hypot(y + 0.5 - cy, x + 0.5 - cx) <= Math.max(radius, 0.71)) painted[y * width + x] = 1;
    }
  }
  show();
}

function go() {
  const { image, width, height } = picture;
  const gone = missing();
  const variants = Number(form.elements.variants.value);
  const first = gone.indexOf(1);
  const cut = form.elements.how.value === 'cut';
  const request = {
    model: models.chosen.name, image, variants,
    class: chosenClass(form),
    temperature: Number(form.elements.temperature.value),
    seed: Number(form.elements.seed.value),
    ...(cut ? { keep: { row: Number(form.elements.row.value) } } : { mask: { levels: rows(gone, width) } }),
  };
  if (first < 0) {
    say('Nothing is missing: paint over what is to be filled in.', true);
    return;
  }
  const shape = { width, height, channels: models.chosen.channels };
  run((signal, tell) => draw(section.querySelector('.pictures'), 'v1/complete', request, shape, variants, signal, tell));
}

/** The mask as a picture: [H][W][1], white where something is missing. */
function rows(gone, width) {
  const all = [];
  for (let at = 0; at < gone.length; at += width) all.push([...gone.subarray(at, at + width)].map((g) => [g * 255]));
  return all;
}

function chosen() {
  reset();
  section.querySelector('.pictures').replaceChildren();
  classes(form);
  // Of a picture in colours a grey model wants another.
  if (picture && picture.channels !== models.chosen.channels) {
    picture = null;
    section.querySelector('.work').hidden = true;
  }
}

export { chosen, start };
