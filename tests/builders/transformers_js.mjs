// Answers of transformers.js to jobs [{folder, kind, prompts, mask, new_tokens}], kind "seq2seq" or "causal":
// all ids, per job.
import { readFileSync, writeFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { AutoModelForCausalLM, AutoModelForSeq2SeqLM, Tensor, env } from '@huggingface/transformers';

const [jobsFile, answersFile] = process.argv.slice(2);
const ids = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

env.allowRemoteModels = false;
const answers = [];
for (const job of JSON.parse(readFileSync(jobsFile, 'utf8'))) {
  env.localModelPath = dirname(job.folder);
  const kind = job.kind === 'causal' ? AutoModelForCausalLM : AutoModelForSeq2SeqLM;
  const model = await kind.from_pretrained(basename(job.folder), { subfolder: '', dtype: 'fp32' });
  const found = await model.generate({
    inputs: ids(job.prompts),
    attention_mask: ids(job.mask),
    max_new_tokens: job.new_tokens,
    min_new_tokens: job.new_tokens,
    do_sample: false,
  });
  answers.push(found.tolist().map((row) => row.map(Number)));
  await model.dispose();
}
writeFileSync(answersFile, JSON.stringify(answers));
