// Training: how runs go, live.

import { COLOURS, cell, chart, duration, element, get, head, legend, work } from './common.js';

const section = document.getElementById('training');
const { say } = work(section);

/** Of each run what it has recorded; and which are shown. */
const records = new Map();
const shownRuns = new Set();
let runs = [];
let events = null;
/** What was asked for last: answers are shown in their order. */
let looking = Promise.resolve();
let touched = false;

function start() {
  section.querySelectorAll('[name=axis]').forEach((radio) => radio.addEventListener('change', curves));
}

/** Listens as long as the tab is looked at. */
function shown() {
  if (events) return;
  events = new EventSource('v1/run-changes');
  events.addEventListener('changed', (event) => lookLater(JSON.parse(event.data)));
  events.addEventListener('error', () => {
    say('The server cannot be reached: trying again.', true);
    if (events?.readyState !== EventSource.CLOSED) return;
    close();
    setTimeout(() => section.hidden || shown(), 5000);
  });
  // Whether a run is still heard of hangs on the time.
  timer = setInterval(() => (section.hidden ? close() : lookLater([])), 30_000);
}

let timer = null;

function close() {
  events?.close();
  events = null;
  clearInterval(timer);
}

function lookLater(changed) {
  if (section.hidden) {
    close();
    return;
  }
  looking = looking.then(() => look(changed)).catch((error) => say(error.message, true));
}

async function look(changed) {
  runs = await get('v1/runs');
  changed.forEach((name) => records.delete(name));
  if (!touched && shownRuns.size === 0 && runs.length) shownRuns.add(runs[0].name);
  say(runs.length ? '' : 'There is no run yet: `pixelcnn train` begins one.');
  await showAll();
}

const isOn = (run) => run.seconds_ago !== undefined && run.seconds_ago < 120 && run.seconds_left !== 0;

async function showAll() {
  for (const name of shownRuns) {
    if (!runs.some((run) => run.name === name)) shownRuns.delete(name);
    else if (!records.has(name)) records.set(name, await get(`v1/runs/${encodeURIComponent(name)}`));
  }
  list();
  curves();
  samples();
  settings();
}

const colourOf = (name) => COLOURS[[...shownRuns].indexOf(name) % COLOURS.length];

function list() {
  const focused = section.querySelector('.runs input:focus')?.value;
  const rows = runs.map((run) => {
    const box = element('input', { type: 'checkbox', value: run.name, checked: shownRuns.has(run.name) });
    box.addEventListener('change', () => {
      touched = true;
      if (box.checked) shownRuns.add(run.name);
      else shownRuns.delete(run.name);
      showAll().catch((error) => say(error.message, true));
    });
    const bits = (value) => value?.toFixed(4) ?? '';
    const ago = run.seconds_ago === undefined ? 'nothing recorded yet' : isOn(run) ? 'training' : `${duration(run.seconds_ago)} ago`;
    return element('tr', {},
      cell(element('label', {}, box, run.name)), cell(run.step.toLocaleString('en'), true), cell(String(run.epoch), true),
      cell(bits(run.train_bits_per_dim), true), cell(bits(run.test_bits_per_dim), true), cell(run.unit),
      cell(run.images_per_second?.toFixed(1) ?? '', true), cell(duration(run.seconds), true),
      cell(run.seconds_left === undefined ? '' : duration(run.seconds_left), true), cell(ago));
  });
  const names = ['Run', '#step', '#epoch', '#train', '#test', '', '#images/s', '#trained', '#left', 'last heard of'];
  section.querySelector('.runs').replaceChildren(element('table', {}, head(...names), element('tbody', {}, ...rows)));
  if (focused) section.querySelector(`.runs input[value="${CSS.escape(focused)}"]`)?.focus();
}

/** Means of neighbours: single steps are too noisy to see a curve in. */
function smooth(points) {
  const together = Math.max(1, Math.ceil(points.length / 100));
  const means = [];
  for (let at = points.length % together; at < points.length; at += together) {
    const chunk = points.slice(at, at + together);
    const mean = (i) => chunk.reduce((sum, point) => sum + point[i], 0) / chunk.length;
    means.push([mean(0), mean(1)]);
  }
  return means;
}

function curves() {
  const byTime = section.querySelector('[name=axis]:checked').value === 'time';
  const chosen = [...shownRuns].map((name) => records.get(name)).filter(Boolean);
  const lines = [];
  const longest = Math.max(0, ...chosen.flatMap((run) => run.train.map((record) => record[1])));
  const [unit, length] = longest < 120 ? ['seconds', 1] : longest < 7200 ? ['minutes', 60] : longest < 259200 ? ['hours', 3600] : ['days', 86400];
  const point = (record) => [byTime ? record[1] / length : record[0], record[2]];
  for (const run of chosen) {
    const colour = colourOf(run.name);
    const train = smooth(run.train.map(point));
    if (train.length) lines.push({ label: `${run.name}, training batches`, colour, points: train });
    if (run.test.length) lines.push({ label: `${run.name}, test set`, colour, points: run.test.map(point), dashed: true });
  }
  const place = section.querySelector('.chart');
  section.querySelector('.axis').hidden = lines.length === 0;
  if (!lines.length) {
    place.replaceChildren();
    return;
  }
  // The first moments are far above all others.
  const ends = lines.map((line) => line.points[line.points.length - 1][1]);
  const lowest = Math.min(...lines.flatMap((line) => line.points.map((p) => p[1])));
  const roof = Math.min(Math.max(...lines.flatMap((line) => line.points.map((p) => p[1]))), Math.max(...ends) + 1);
  const units = new Set(runs.filter((run) => shownRuns.has(run.name)).map((run) => run.unit));
  const drawing = chart({
    lines, roof, bottom: lowest - 0.05 * (roof - lowest), from: 0,
    x: byTime ? `${unit} of training` : 'steps', y: [...units].join(', '), label: 'Training curves',
  });
  const labels = lines.map(({ label, colour, dashed }) => ({ label: dashed ? `${label} (dashed)` : label, colour }));
  place.replaceChildren(drawing, legend(labels));
}

function samples() {
  const place = section.querySelector('.samples');
  const run = runs.find((one) => shownRuns.has(one.name) && one.samples.length);
  if (!run) {
    place.replaceChildren();
    return;
  }
  const last = run.samples.length - 1;
  const address = (file) => `v1/runs/${encodeURIComponent(run.name)}/samples/${encodeURIComponent(file)}`;
  const before = place.querySelector('input');
  if (before?.dataset.run === run.name) {
    // The slider stays, for somebody may have it in hand; at its end it follows.
    const follows = before.value === before.max;
    before.pictures = run.samples;
    before.max = last;
    if (follows) before.value = last;
    before.dispatchEvent(new Event('input'));
    return;
  }
  const slider = element('input', { type: 'range', min: 0, max: last, value: last });
  slider.pictures = run.samples;
  slider.dataset.run = run.name;
  const picture = element('img');
  const name = element('span');
  const show = () => {
    const file = slider.pictures[slider.value];
    if (picture.getAttribute('src') === address(file)) return;
    picture.src = address(file);
    picture.alt = `Samples of ${run.name}, ${file}`;
    name.textContent = file.replace(/\.png$/, '');
  };
  slider.addEventListener('input', show);
  show();
  place.replaceChildren(element('h2', {}, `What ${run.name} draws`), element('label', {}, 'Since its beginning', slider, name), element('div', {}, picture));
}

/** Settings by their names, with a dot between the parts. */
function flat(settings, under = '') {
  return Object.entries(settings ?? {}).flatMap(([key, value]) =>
    value !== null && typeof value === 'object' && !Array.isArray(value) ? flat(value, `${under}${key}.`) : [[under + key, JSON.stringify(value)]]);
}

function settings() {
  const chosen = [...shownRuns].map((name) => records.get(name)).filter((run) => run?.settings);
  const place = section.querySelector('.settings');
  if (!chosen.length) {
    place.replaceChildren();
    return;
  }
  const maps = chosen.map((run) => new Map(flat(run.settings)));
  const names = [...new Set(maps.flatMap((map) => [...map.keys()]))];
  const rows = names.map((name) => {
    const values = maps.map((map) => map.get(name) ?? '');
    const differs = new Set(values).size > 1;
    return element('tr', { className: differs ? 'differs' : '' }, cell(name), ...values.map((value) => cell(value)));
  });
  const open = place.querySelector('details')?.open ?? false;
  const table = element('table', {}, head('', ...chosen.map((run) => run.name)), element('tbody', {}, ...rows));
  place.replaceChildren(element('details', { open }, element('summary', {}, 'Settings side by side'), table));
}

export { shown, start };
