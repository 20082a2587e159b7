// The methods' mathematics for one picture and one class, from exported cosines. No drawing here.
// cos: N x M cosines of crops and descriptions; r, c: masses of crops and descriptions that sum to one.
"use strict";
const upclose = (() => {
  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const mean = (x) => sum(x) / x.length;
  const softmax = (x, scale = 1) => {
    const top = Math.max(...x);
    const part = x.map((v) => Math.exp(scale * (v - top)));
    const whole = sum(part);
    return part.map((v) => v / whole);
  };
  const outer = (r, c) => r.map((a) => c.map((b) => a * b));
  const inner = (plan, value) => sum(plan.map((row, n) => sum(row.map((mass, m) => mass * value[n][m]))));
  const uniform = (n) => Array(n).fill(1 / n);
  const logSumExp = (x, y) => {  // of x + y, in loops: it is most of a slider's answer
    let top = -Infinity, total = 0;
    for (let i = 0; i < x.length; i++) top = Math.max(top, x[i] + y[i]);
    for (let i = 0; i < x.length; i++) total += Math.exp(x[i] + y[i] - top);
    return top + Math.log(total);
  };

  // Entropic optimal transport in the log domain (LaZSL eqs. 11-13): rows without mass take none.
  function sinkhorn(cost, r, c, epsilon, maxRounds = 2000, tolerance = 1e-7) {
    const kernel = cost.map((row) => row.map((v) => -v / epsilon));
    const logR = r.map(Math.log), logC = c.map(Math.log), turned = c.map((_, m) => kernel.map((row) => row[m]));
    const g = c.map(() => 0), f = r.map((v) => (v > 0 ? 0 : -Infinity));
    for (let round = 0; round < maxRounds; round++) {
      for (let n = 0; n < r.length; n++) if (r[n] > 0) f[n] = logR[n] - logSumExp(kernel[n], g);
      let error = 0;
      for (let m = 0; m < c.length; m++) {
        const column = logSumExp(turned[m], f);
        error += Math.abs(Math.exp(column + g[m]) - c[m]);
        g[m] = logC[m] - column;
      }
      if (error < tolerance) break;
    }
    return kernel.map((row, n) => row.map((v, m) => Math.exp(v + f[n] + g[m])));
  }

  // Every method gives {score, plan (N x M mass), crop (N,), description (M,), matched (M,)}: what it matched, how much
  // of each, and the mean cosine of a description with what it was matched with.
  const result = (score, plan, value) => {
    const description = plan[0].map((_, m) => sum(plan.map((row) => row[m])));
    const matched = description.map((mass, m) => sum(plan.map((row, n) => row[m] * value[n][m])) / mass);
    return { score, plan, crop: plan.map(sum), description, matched };
  };

  function clipD(view) {
    const weights = uniform(view.whole.length);
    return { score: mean(view.whole), plan: null, crop: null, description: weights, matched: view.whole };
  }

  function multiCrop(view) {
    const plan = outer(uniform(view.cos.length), uniform(view.whole.length));
    return result(inner(plan, view.cos), plan, view.cos);
  }

  function wca(view, { imageScale = 1, textScale = 1 } = {}) {
    const plan = outer(softmax(view.crop, imageScale), softmax(view.label, textScale));
    return result(inner(plan, view.cos), plan, view.cos);
  }

  // levels: the views of one picture, crops expanded 0, 1, 2, ... times. The plan shown is that of `step`.
  function lgca(levels, { imageScale = 1, textScale = 1, step = 0 } = {}) {
    let members = levels[0].cos.map((_, n) => n), shown = null, total = 0;
    const text = softmax(levels[0].label, textScale);
    levels.forEach((view, t) => {
      const weight = softmax(members.map((n) => view.crop[n]), imageScale);
      const plan = view.cos.map(() => text.map(() => 0));
      members.forEach((n, s) => text.forEach((v, m) => { plan[n][m] = weight[s] * v; }));
      total += inner(plan, view.cos) / levels.length;
      if (t === Math.min(step, levels.length - 1)) shown = { plan, cos: view.cos };
      const keep = Math.max(1, view.cos.length >> (t + 1));
      const entries = members.flatMap((n) => text.map((_, m) => ({ n, m, a: plan[n][m] * view.cos[n][m] })));
      entries.sort((x, y) => y.a - x.a || x.n - y.n || x.m - y.m);
      members = [...new Set(entries.slice(0, keep).map((entry) => entry.n))].sort((x, y) => x - y);
    });
    return result(total, shown.plan, shown.cos);
  }

  function lazsl(view, { theta = 0.8, epsilon = 0.1 } = {}) {
    const least = mean(view.crop) - 1e-6;
    const kept = view.crop.map((v) => (v >= least ? 1 : 0));
    const r = kept.map((v) => v / sum(kept));
    const similarity = view.cos.map((row) => row.map((v, m) => theta * v + (1 - theta) * view.whole[m]));
    const plan = sinkhorn(similarity.map((row) => row.map((v) => 1 - v)), r, uniform(view.whole.length), epsilon);
    return result(inner(plan, similarity), plan, similarity);
  }

  function dnd(view, { epsilon = 0.01 } = {}) {
    const cost = view.cos.map((row) => row.map((v) => 1 - v));
    const plan = sinkhorn(cost, uniform(cost.length), uniform(cost[0].length), epsilon);
    return result(-inner(plan, cost), plan, view.cos);
  }

  return { softmax, sinkhorn, clipD, multiCrop, wca, lgca, lazsl, dnd };
})();
if (typeof module !== "undefined") module.exports = upclose;
