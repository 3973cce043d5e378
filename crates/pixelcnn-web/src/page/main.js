// The page: the model, and which of its parts is shown.

import { get, models } from './common.js';
import * as draw from './draw.js';
import * as complete from './complete.js';
import * as score from './score.js';
import * as compress from './compress.js';
import * as training from './training.js';

const parts = { draw, complete, score, compress, training };
const tabs = [...document.querySelectorAll('[role=tab]')];
const choice = document.getElementById('model');

function show(name, focus = false) {
  for (const tab of tabs) {
    const own = tab.getAttribute('aria-controls');
    tab.setAttribute('aria-selected', own === name);
    tab.tabIndex = own === name ? 0 : -1;
    document.getElementById(own).hidden = own !== name;
    if (own === name && focus) tab.focus();
  }
  if (location.hash !== `#${name}`) history.replaceState(null, '', `#${name}`);
  parts[name].shown?.();
}

tabs.forEach((tab, number) => {
  tab.addEventListener('click', () => show(tab.getAttribute('aria-controls')));
  tab.addEventListener('keydown', (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) show(tabs[(number + by + tabs.length) % tabs.length].getAttribute('aria-controls'), true);
  });
});

function choose() {
  models.chosen = models.all.find((model) => model.name === choice.value) ?? null;
  for (const button of document.querySelectorAll('.go, .another, .own')) button.disabled = !models.chosen;
  describe();
  if (models.chosen) Object.values(parts).forEach((part) => part.chosen?.());
}

function describe() {
  const card = document.getElementById('card');
  if (!models.chosen) {
    card.textContent = 'There is no model yet: `pixelcnn train` makes one.';
    return;
  }
  const { width, height, channels, card: known } = models.chosen;
  const shape = `${width}x${height}, ${channels === 1 ? 'grey' : 'colours'}`;
  const bits = known?.measured;
  const error = bits?.standard_error === undefined ? '' : ` ± ${bits.standard_error.toFixed(4)}`;
  const measured = bits ? `, ${bits.bits_per_dim.toFixed(4)}${error} bits/dim on ${bits.images}` : '';
  card.textContent = known ? `${known.name}: ${shape}, step ${known.step.toLocaleString('en')}${measured}` : shape;
}

/** What a choice of models shows: those that cannot be used with the reason. */
function options() {
  return models.all.map(({ name, problem }) => {
    const option = new Option(problem ? `${name}: ${problem}` : name, name);
    option.disabled = Boolean(problem);
    return option;
  });
}

async function list() {
  const before = JSON.stringify(models.all);
  models.all = await get('v1/models');
  if (JSON.stringify(models.all) === before) return;
  const chosen = models.all.find(({ name, problem }) => name === choice.value && !problem);
  const first = models.all.find(({ problem }) => !problem);
  choice.replaceChildren(...options());
  choice.value = (chosen ?? first)?.name ?? '';
  if (chosen && models.chosen) {
    // What is known of it may have changed; what is being done goes on.
    models.chosen = chosen;
    describe();
  } else {
    choose();
  }
}

choice.addEventListener('change', choose);
// Runs begin and go on.
setInterval(() => document.hidden || list().catch(() => {}), 5000);
// A file that is dropped beside its place is not to replace the page.
for (const kind of ['dragover', 'drop']) window.addEventListener(kind, (event) => event.preventDefault());
Object.values(parts).forEach((part) => part.start());
try {
  await list();
} catch (error) {
  document.getElementById('card').textContent = error.message;
}
const wanted = location.hash.slice(1);
show(wanted in parts ? wanted : 'draw');
