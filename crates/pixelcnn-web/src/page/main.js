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
  Object.values(parts).forEach((part) => part.chosen?.());
}

async function list() {
  models.all = (await get('v1/models')).filter((model) => !model.problem);
  const before = choice.value;
  choice.replaceChildren(...models.all.map(({ name }) => new Option(name, name)));
  if (models.all.some(({ name }) => name === before)) choice.value = before;
  if (choice.value !== before || !models.chosen) choose();
}

choice.addEventListener('change', choose);
choice.addEventListener('focus', () => list().catch(() => {}));
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
