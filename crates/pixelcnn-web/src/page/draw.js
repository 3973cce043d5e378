// Draw: pictures appear row by row; each can be looked at closely.

import {
  Picture, ask, bytes, chart, chosenClass, classes, colour, element, heat, models, paint, post, sliders, waiting, work,
} from './common.js';

const section = document.getElementById('draw');
const form = section.querySelector('form');
const closer = section.querySelector('.closer');
const view = closer.querySelector('.picture');
const cursor = closer.querySelector('.cursor');
const { run, reset } = work(section);

/** The picture that is looked at: with its class, its bits per pixel once they are known, and the pixel. */
let looked = null;

/** Draws pictures into a place; those that are done can be looked at, if `look` is given. */
export async function draw(place, path, request, shape, count, signal, say, look = null) {
  const { height, width, channels } = shape;
  const pictures = Array.from({ length: count }, () => new Picture(height, width, channels));
  const shown = pictures.map((picture, i) => {
    if (!look) return element('figure', {}, picture.canvas);
    const button = element('button', { type: 'button', title: 'Look closer', disabled: true }, picture.canvas);
    button.setAttribute('aria-label', `Picture ${i + 1}: look closer`);
    button.setAttribute('aria-pressed', 'false');
    return button;
  });
  place.replaceChildren(...shown);
  const start = performance.now();
  const done = await ask(path, { ...request, format: 'levels' }, (name, data) => {
    const queue = waiting(name, data);
    if (queue) say(queue);
    if (name !== 'rows') return;
    data.rows.forEach((row, i) => pictures[i].row(data.row, bytes(row)));
    say(`row ${data.row + 1} of ${height}`);
  }, signal);
  const seconds = (performance.now() - start) / 1000;
  say(`${count} ${count === 1 ? 'picture' : 'pictures'} in ${seconds.toFixed(1)} s, seed ${done.seed}`);
  if (!look) return;
  shown.forEach((button, i) => {
    const one = { picture: pictures[i], button, label: done.classes?.[i], model: done.model };
    button.disabled = false;
    button.addEventListener('click', () => look(one));
  });
}

function start() {
  sliders(form);
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    go();
  });
  section.querySelector('.another').addEventListener('click', () => {
    form.elements.seed.value = Math.floor(Math.random() * 2 ** 31);
    if (form.reportValidity()) go();
  });
  view.addEventListener('pointermove', (event) => {
    const box = view.getBoundingClientRect();
    at(Math.floor(((event.clientY - box.top) / box.height) * view.height), Math.floor(((event.clientX - box.left) / box.width) * view.width));
  });
  view.addEventListener('keydown', (event) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!by || !looked) return;
    event.preventDefault();
    const [y, x] = looked.pixel ?? [0, 0];
    at(y + by[0], x + by[1]);
  });
  closer.querySelectorAll('[name=layer]').forEach((radio) => radio.addEventListener('change', layer));
  closer.querySelector('.on').addEventListener('click', onFromHere);
}

function go() {
  closer.hidden = true;
  forget();
  const count = Number(form.elements.count.value);
  const request = {
    model: models.chosen.name,
    count,
    class: chosenClass(form),
    temperature: Number(form.elements.temperature.value),
    seed: Number(form.elements.seed.value),
  };
  run(async (signal, say) => {
    await draw(section.querySelector('.pictures'), 'v1/sample', request, models.chosen, count, signal, say, look);
  });
}

/** Looks closely at a picture that was drawn. */
function look(one) {
  section.querySelectorAll('[aria-pressed=true]').forEach((button) => button.setAttribute('aria-pressed', 'false'));
  one.button.setAttribute('aria-pressed', 'true');
  forget();
  looked = { ...one, bits: null, pixel: null };
  closer.hidden = false;
  closer.querySelector('[name=layer]').checked = true;
  closer.querySelector('.chart').replaceChildren();
  closer.querySelector('.likely').textContent = '';
  closer.querySelector('.where').textContent = 'Point at a pixel, or move to it with the arrow keys.';
  closer.querySelector('.variants').replaceChildren();
  closer.querySelector('.on').disabled = true;
  const likely = models.chosen.likelihood;
  closer.querySelector('fieldset').hidden = !likely;
  cursor.hidden = true;
  layer();
  closer.scrollIntoView({ block: 'nearest' });
}

/** Expects no answers any more. */
function forget() {
  asking?.abort();
  clearTimeout(later);
  looked = null;
}

async function layer() {
  if (!looked) return;
  const { picture } = looked;
  const wanted = () => closer.querySelector('[name=layer]:checked').value === 'bits';
  closer.querySelector('.scale').hidden = !wanted();
  if (!wanted()) {
    view.width = picture.width;
    view.height = picture.height;
    paint(view, picture.levels, picture.channels);
    return;
  }
  const mine = looked;
  if (!mine.bits) {
    const request = { model: mine.model, images: [{ levels: picture.nested }], class: mine.label, maps: true };
    try {
      mine.bits = (await post('v1/score', request)).scores[0].bits_per_pixel;
    } catch (error) {
      closer.querySelector('.where').textContent = error.message;
      return;
    }
  }
  if (looked !== mine || !wanted()) return;
  const most = heat(view, mine.bits);
  closer.querySelector('.scale .top').textContent = `${most.toFixed(1)} bits`;
  const steps = Array.from({ length: 128 }, (_, i) => colour(i / 127)).flat();
  paint(closer.querySelector('.scale canvas'), steps, 3);
}

let asking = null;
let later = null;

/** Moves to a pixel and asks what the model expects there. */
function at(y, x) {
  if (!looked) return;
  const { picture } = looked;
  y = Math.min(Math.max(y, 0), picture.height - 1);
  x = Math.min(Math.max(x, 0), picture.width - 1);
  if (looked.pixel && looked.pixel[0] === y && looked.pixel[1] === x) return;
  looked.pixel = [y, x];
  Object.assign(cursor.style, {
    left: `${(100 * x) / picture.width}%`, top: `${(100 * y) / picture.height}%`,
    width: `${100 / picture.width}%`, height: `${100 / picture.height}%`,
  });
  cursor.hidden = false;
  closer.querySelector('.on').disabled = false;
  if (!models.chosen.likelihood) return;
  clearTimeout(later);
  later = setTimeout(expect, 60);
}

async function expect() {
  asking?.abort();
  asking = new AbortController();
  const mine = looked;
  const [y, x] = mine.pixel;
  const request = { model: mine.model, image: { levels: mine.picture.nested }, pixel: [y, x], class: mine.label };
  const where = closer.querySelector('.where');
  try {
    const found = await post('v1/distribution', request, asking.signal);
    if (looked !== mine) return;
    const names = found.levels.length === 1 ? ['grey'] : ['red', 'green', 'blue'];
    const colours = found.levels.length === 1 ? ['#777777'] : ['#d3423e', '#3a9a45', '#3b74c9'];
    where.textContent = `Row ${y}, column ${x}, given all pixels before it${names.length > 1 ? ', and green given red, blue given both' : ''}:`;
    const lines = found.probabilities.map((probabilities, c) => ({ colour: colours[c], points: probabilities.map((p, level) => [level, p]) }));
    const marks = found.levels.map((level, c) => ({ at: level, colour: colours[c], label: `${names[c]} is ${level}` }));
    const drawing = chart({ lines, marks, x: 'level', y: 'probability', bottom: 0, from: 0, to: 255, label: 'The probability of each level' });
    closer.querySelector('.chart').replaceChildren(drawing);
    const bits = found.probabilities.map((p, c) => -Math.log2(p[found.levels[c]]));
    const total = bits.reduce((a, b) => a + b, 0);
    const each = bits.map((b, c) => `${names[c]} ${found.levels[c]}: ${b.toFixed(2)}`).join(', ');
    closer.querySelector('.likely').textContent = `Bits of what is there: ${total.toFixed(2)} (${each})`;
  } catch (error) {
    if (error.name !== 'AbortError' && looked === mine) where.textContent = error.message;
  }
}

/** Draws what could follow the pixel instead. */
function onFromHere() {
  const { picture, pixel, model, label } = looked;
  const request = {
    model, class: label, variants: 5,
    image: { levels: picture.nested },
    keep: { row: pixel[0], column: pixel[1] },
    temperature: Number(form.elements.temperature.value),
    seed: Math.floor(Math.random() * 2 ** 31),
  };
  run(async (signal, say) => {
    const lookAt = (one) => look({ ...one, label });
    await draw(closer.querySelector('.variants'), 'v1/complete', request, picture, 5, signal, say, lookAt);
  });
}

function chosen() {
  reset();
  classes(form, 'all in turn');
  closer.hidden = true;
  forget();
  section.querySelector('.pictures').replaceChildren();
}

export { chosen, start };
