// What all of the page shares: asking the server, pictures, charts.

/** The models, as the server lists them, and the one that is chosen. */
export const models = { all: [], chosen: null };

/** A new element. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** A problem that the server tells, or that it cannot be reached. */
export class Refused extends Error {}

/** Bytes of files that go into a request. */
const MOST = 45e6;

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused('The server cannot be reached.');
  }
}

async function refusal(response) {
  let text = `${response.status} ${response.statusText}`;
  try {
    text = (await response.json()).detail ?? text;
  } catch {
    // It has no more to say.
  }
  return new Refused(text);
}

/** Asks for something. */
export async function get(path, signal = undefined) {
  const response = await reach(path, { signal });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** Asks for work, and hears how it gets on: `told` gets each event's name and data. Gives the result. */
export async function ask(path, request, told = () => {}, signal = undefined) {
  const response = await reach(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused('the server broke off');
    text += value;
    let end;
    while ((end = text.indexOf('\n\n')) >= 0) {
      const { name, data } = parsed(text.slice(0, end));
      text = text.slice(end + 2);
      if (name === 'done') return data;
      if (name === 'problem') throw new Refused(data.detail);
      if (name) told(name, data);
    }
  }
}

function parsed(event) {
  let name = null;
  let data = '';
  for (const line of event.split('\n')) {
    if (line.startsWith('event:')) name = line.slice(6).trim();
    if (line.startsWith('data:')) data += line.slice(5).trim();
  }
  return { name, data: data ? JSON.parse(data) : null };
}

/** Asks for something small, at once. */
export async function post(path, request, signal = undefined) {
  const response = await reach(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(request),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** One piece of work at a time, with a line that says how it is and a button that stops it. */
export function work(section) {
  const status = section.querySelector('.status');
  const stop = section.querySelector('.stop');
  let running = null;
  const say = (text, bad = false) => {
    status.textContent = text;
    status.classList.toggle('bad', bad);
  };
  const run = async (what) => {
    running?.abort();
    const mine = new AbortController();
    running = mine;
    if (stop) stop.disabled = false;
    say('…');
    try {
      await what(mine.signal, say);
    } catch (error) {
      if (running !== mine) return;
      if (error.name === 'AbortError') say('Stopped.');
      else if (error instanceof Refused) say(error.message, true);
      else {
        say(String(error), true);
        console.error(error);
      }
    } finally {
      if (running === mine) {
        running = null;
        if (stop) stop.disabled = true;
      }
    }
  };
  stop?.addEventListener('click', () => running?.abort());
  /** Gives up what is being done, and forgets what was said. */
  const reset = () => {
    running?.abort();
    running = null;
    if (stop) stop.disabled = true;
    say('');
  };
  return { run, say, reset };
}

/** What an event says about the queue. */
export function waiting(name, data) {
  if (name !== 'queue') return null;
  return data.ahead > 0 ? `${data.ahead} before this one in the queue…` : 'its turn has come…';
}

/** The bytes of a base64 text. */
export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Checks that files are not more than the server takes. */
export function expectFew(files) {
  const total = files.reduce((sum, file) => sum + file.size, 0);
  if (total > MOST) throw new Refused(`${size(total)} of files: at most ${size(MOST)} are taken at a time; the program has no such limit.`);
}

/** A file's bytes as base64. */
export async function base64(file) {
  const data = new Uint8Array(await file.arrayBuffer());
  const parts = [];
  for (let at = 0; at < data.length; at += 0x8000) {
    parts.push(String.fromCharCode(...data.subarray(at, at + 0x8000)));
  }
  return btoa(parts.join(''));
}

/** A picture of levels, [height, width, channels], that grows row by row. */
export class Picture {
  constructor(height, width, channels) {
    Object.assign(this, { height, width, channels });
    this.levels = new Uint8Array(height * width * channels);
    this.canvas = element('canvas', { width, height });
  }

  /** Takes a row. */
  row(number, levels) {
    this.levels.set(levels, number * this.width * this.channels);
    paint(this.canvas, this.levels, this.channels, number, number + 1);
  }

  /** [H][W][C], as the server takes it. */
  get nested() {
    const { height, width, channels, levels } = this;
    const pixel = (y, x) => [...levels.subarray((y * width + x) * channels, (y * width + x + 1) * channels)];
    const row = (y) => Array.from({ length: width }, (_, x) => pixel(y, x));
    return Array.from({ length: height }, (_, y) => row(y));
  }
}

/** Paints levels on a canvas of their size. */
export function paint(canvas, levels, channels, from = 0, to = canvas.height) {
  const { width } = canvas;
  const pixels = new ImageData(width, to - from);
  for (let i = 0; i < width * (to - from); i++) {
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = levels[(from * width + i) * channels + Math.min(c, channels - 1)];
    }
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(pixels, 0, from);
}

// Viridis at equal distances: from dark to bright in steps that look alike, also to those who see no colours.
const VIRIDIS = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37],
];

/** The colour of a share from 0 to 1. */
export function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((from, c) => from + (VIRIDIS[low + 1][c] - from) * (at - low));
}

/** The bits at which a heat map's scale ends: a pixel in a hundred has more. */
export function top(map) {
  const sorted = map.flat().sort((a, b) => a - b);
  return Math.max(sorted[Math.floor(sorted.length * 0.99)], 0.001);
}

/** A heat map of bits per pixel, [H][W]. */
export function heat(canvas, map, most = top(map)) {
  canvas.height = map.length;
  canvas.width = map[0].length;
  const levels = map.flat().flatMap((bits) => colour(bits / most));
  paint(canvas, levels, 3);
  return most;
}

const SVG = 'http://www.w3.org/2000/svg';

/** A new element of a drawing. */
export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Colours of lines that can be told apart. */
export const COLOURS = ['#0b8a92', '#d1662a', '#7556c4', '#5a8f29', '#c2437f', '#8a6d1f', '#3b74c9', '#777777'];

function ticks(from, to, about) {
  const rough = (to - from) / about || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const all = [];
  for (let tick = Math.ceil(from / step) * step; tick <= to + step * 1e-9; tick += step) all.push(tick);
  return { all, digits: Math.max(0, -Math.floor(Math.log10(step))) };
}

/**
 * A chart. Lines are {label, colour, points: [[x, y]…], dashed}; bars {label, colour, bars: [[from, to, height]…]};
 * marks {label, colour, at}: an upright line.
 */
export function chart({ lines = [], bars = [], marks = [], x, y, label, from, to, bottom, roof }) {
  const [width, height, left, below] = [640, 280, 56, 40];
  const points = lines.flatMap((line) => line.points);
  const xs = [...points.map((p) => p[0]), ...bars.flatMap((b) => b.bars.flatMap((bar) => [bar[0], bar[1]])), ...marks.map((m) => m.at)];
  const ys = [...points.map((p) => p[1]), ...bars.flatMap((b) => b.bars.map((bar) => bar[2]))];
  const least = (all) => all.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (all) => all.reduce((a, b) => Math.max(a, b), -Infinity);
  from ??= least(xs);
  to ??= most(xs);
  bottom ??= bars.length ? 0 : least(ys);
  roof ??= most(ys);
  if (!(to > from)) to = from + 1;
  if (!(roof > bottom)) roof = bottom + 1;
  const px = (value) => left + ((value - from) / (to - from)) * (width - left - 12);
  const py = (value) => height - below - ((value - bottom) / (roof - bottom)) * (height - below - 14);
  const drawing = svg('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label });
  const across = ticks(from, to, 8);
  for (const tick of across.all) {
    drawing.append(
      svg('line', { class: 'axis', x1: px(tick), x2: px(tick), y1: 14, y2: height - below }),
      svg('text', { x: px(tick), y: height - below + 16, 'text-anchor': 'middle' }, tick.toFixed(across.digits)),
    );
  }
  const up = ticks(bottom, roof, 5);
  for (const tick of up.all) {
    drawing.append(
      svg('line', { class: 'axis', x1: left, x2: width - 12, y1: py(tick), y2: py(tick) }),
      svg('text', { x: left - 6, y: py(tick) + 4, 'text-anchor': 'end' }, tick.toFixed(up.digits)),
    );
  }
  drawing.append(
    svg('text', { x: (left + width) / 2, y: height - 6, 'text-anchor': 'middle' }, x),
    svg('text', { x: left, y: 11 }, y),
  );
  for (const { bars: of, colour: fill } of bars) {
    for (const [a, b, tall] of of) {
      drawing.append(svg('rect', { x: px(a), width: Math.max(px(b) - px(a) - 0.5, 0.5), y: py(tall), height: py(bottom) - py(tall), fill, opacity: 0.7 }));
    }
  }
  for (const { points: of, colour: stroke, dashed } of lines) {
    const path = of.map(([a, b]) => `${px(a).toFixed(1)},${py(Math.min(Math.max(b, bottom), roof)).toFixed(1)}`);
    drawing.append(svg('polyline', { points: path.join(' '), fill: 'none', stroke, 'stroke-width': 2, ...(dashed && { 'stroke-dasharray': '6 4' }) }));
  }
  for (const { at, colour: stroke, label: name } of marks) {
    const line = svg('line', { x1: px(at), x2: px(at), y1: 14, y2: height - below, stroke, 'stroke-width': 2.5 });
    line.append(svg('title', {}, name));
    drawing.append(line);
  }
  return drawing;
}

/** A legend. */
export function legend(entries) {
  const key = (colour) => {
    const made = element('span', { className: 'key' });
    made.style.background = colour;
    return made;
  };
  return element('p', {}, ...entries.flatMap(({ label, colour }) => [key(colour), `${label}   `]));
}

/** Lets files be dropped on a label, and chosen by it. */
export function chooser(label, take) {
  const input = label.querySelector('input');
  input.addEventListener('change', () => {
    const files = [...input.files];
    input.value = '';
    if (files.length) take(files);
  });
  label.addEventListener('dragover', (event) => {
    event.preventDefault();
    label.classList.add('over');
  });
  label.addEventListener('dragleave', () => label.classList.remove('over'));
  label.addEventListener('drop', (event) => {
    event.preventDefault();
    label.classList.remove('over');
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
  });
}

/** Shows what a slider is at. */
export function sliders(form) {
  const show = () => (form.querySelector('.shown').textContent = form.elements.temperature.value);
  form.elements.temperature.addEventListener('input', show);
  show();
}

/** Fills a choice of classes, hidden where the model has none; `all` is an entry for all of them. */
export function classes(form, all = null) {
  const label = form.querySelector('.class');
  const { nr_classes: count, classes: names } = models.chosen;
  label.hidden = count === 0;
  const entries = Array.from({ length: count }, (_, i) => new Option(names[i] ?? `class ${i}`, i));
  form.elements.class.replaceChildren(...(all && count ? [new Option(all, '')] : []), ...entries);
}

/** The class that is chosen, if any. */
export function chosenClass(form) {
  const { value } = form.elements.class;
  return models.chosen.nr_classes && value !== '' ? Number(value) : undefined;
}

/** Bytes as people read them. */
export function size(count) {
  if (count < 1000) return `${count} B`;
  const [digits, unit] = count < 1e6 ? [count / 1e3, 'kB'] : [count / 1e6, 'MB'];
  return `${digits.toPrecision(digits >= 1000 ? 4 : 3)} ${unit}`;
}

/** Seconds as people read them. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${whole} s`;
}

/** A table cell. */
export function cell(content, number = false) {
  return element('td', { className: number ? 'number' : '' }, ...[content ?? ''].flat());
}

/** A table's first row. */
export function head(...names) {
  const cells = names.map((name) => element('th', { scope: 'col', className: name.startsWith('#') ? 'number' : '' }, name.replace('#', '')));
  return element('thead', {}, element('tr', {}, ...cells));
}
