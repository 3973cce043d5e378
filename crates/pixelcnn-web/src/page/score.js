// Score: how unusual pictures are, and where their bits go.

import {
  COLOURS, ask, base64, cell, chart, chooser, chosenClass, classes, element, expectFew, get, head, heat, legend, models, waiting, work,
} from './common.js';

const section = document.getElementById('score');
const { run, reset } = work(section);

function start() {
  chooser(section.querySelector('.drop'), score);
}

function score(files) {
  run(async (signal, say) => {
    const shrink = section.querySelector('[name=fit]:checked').value === 'shrink';
    const model = models.chosen;
    const pictures = [];
    if (!shrink) expectFew(files);
    for (const file of files) pictures.push(shrink ? await shrunk(file, model) : { file, picture: await base64(file) });
    say('measuring…');
    const images = pictures.map(({ picture }) => ({ picture }));
    const request = { model: model.name, maps: true, images, class: chosenClass(section.querySelector('form')) };
    const { scores } = await ask('v1/score', request, (name, data) => say(waiting(name, data) ?? 'measuring…'), signal);
    show(pictures, scores, null);
    // Test images are measured in their own classes.
    if (model.nr_classes) {
      say(`${scores.length} measured`);
      return;
    }
    say('measuring test images to compare with…');
    const known = await get(`v1/models/${encodeURIComponent(model.name)}/reference`, signal).catch((error) => {
      if (error.name === 'AbortError') throw error;
      return null;
    });
    show(pictures, scores, known);
    say(`${scores.length} measured`);
  });
}

/** The largest centred square of a picture, shrunk to the model's size. */
async function shrunk(file, { width, height }) {
  const bitmap = await createImageBitmap(file);
  const side = Math.min(bitmap.width, bitmap.height);
  const canvas = element('canvas', { width, height });
  const context = canvas.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, width, height);
  const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));
  return { file: new File([blob], file.name), picture: await base64(blob), from: `${bitmap.width}x${bitmap.height}` };
}

/** The share of the reference's images that have a lower score. */
function below(quantiles, score) {
  return quantiles.filter((value) => value < score).length / quantiles.length;
}

function histogram(quantiles, name, key, scores) {
  const [least, most] = [quantiles[0], quantiles[quantiles.length - 1]];
  const bins = 32;
  const step = (most - least) / bins || 1;
  const heights = Array.from({ length: bins }, () => 0);
  for (const value of quantiles) heights[Math.min(Math.floor((value - least) / step), bins - 1)] += 100 / quantiles.length;
  const bars = heights.map((tall, i) => [least + i * step, least + (i + 1) * step, tall]);
  const marks = scores.map((score, i) => ({ at: score[key], colour: COLOURS[i % COLOURS.length], label: `picture ${i + 1}` }));
  return element('div', {}, chart({ bars: [{ bars, colour: '#8a93a3' }], marks, x: name, y: '% of the images', label: name }));
}

function show(pictures, scores, known) {
  const histograms = section.querySelector('.histograms');
  histograms.replaceChildren();
  if (known) {
    histograms.append(
      histogram(known.bits_per_dim, 'bits/dim', 'bits_per_dim', scores),
      histogram(known.corrected, 'bits/dim less those of the smaller file', 'corrected', scores),
      legend([{ label: `${known.count.toLocaleString('en')} of ${known.images}`, colour: '#8a93a3' }, ...pictures.slice(0, 8).map(({ file }, i) => ({ label: file.name, colour: COLOURS[i] }))]),
    );
  }
  const rows = scores.map((score, i) => {
    const { file, from } = pictures[i];
    const picture = element('img', { src: URL.createObjectURL(file), alt: file.name });
    const map = element('canvas');
    const most = heat(map, score.bits_per_pixel);
    map.setAttribute('role', 'img');
    map.setAttribute('aria-label', `Bits per pixel of ${file.name}, from 0 to ${most.toFixed(1)}`);
    map.title = `0 to ${most.toFixed(1)} bits`;
    const [height, width] = score.size;
    const compared = known ? [cell(`${(100 * below(known.corrected, score.corrected)).toFixed(0)} %`, true)] : [];
    return element('tr', {},
      cell([picture, element('br'), `${file.name}, ${width}x${height}${from ? ` (of ${from})` : ''}`]),
      cell(map), cell(score.bits_per_dim.toFixed(4), true), cell(score.png_bits_per_dim.toFixed(4), true),
      cell(score.jpeg_xl_bits_per_dim.toFixed(4), true), cell(score.corrected.toFixed(4), true), ...compared);
  });
  const names = ['Picture', 'Where its bits go', '#bits/dim', '#as PNG', '#as JPEG XL', '#corrected'];
  if (known) names.push('#are more usual');
  section.querySelector('.results').replaceChildren(element('table', {}, head(...names), element('tbody', {}, ...rows)));
}

function chosen() {
  reset();
  classes(section.querySelector('form'));
  section.querySelector('.results').replaceChildren();
  section.querySelector('.histograms').replaceChildren();
}

export { chosen, start };
