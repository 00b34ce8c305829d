// An election of the npm package `etcd3`, as a program that tests can drive.
//
//   node election.js ENDPOINT NAME campaign VALUE   says `elected`; takes `proclaim VALUE` and `resign` as lines
//   node election.js ENDPOINT NAME observe          says each leader's value, and `-` when there is none
const { Etcd3 } = require('etcd3');
const { createInterface } = require('readline');

const [endpoint, name, command, value] = process.argv.slice(2);
const election = new Etcd3({ hosts: endpoint }).election(name, 10);
const fail = error => {
  console.error(error);
  process.exit(1);
};

async function campaign() {
  const campaign = election.campaign(value);
  campaign.on('elected', () => console.log('elected'));
  campaign.on('error', fail);
  for await (const line of createInterface({ input: process.stdin })) {
    const [verb, value] = line.split(' ');
    if (verb === 'resign') break;
    await campaign.proclaim(value);
  }
  await campaign.resign();
  process.exit(0);
}

async function observe() {
  const observer = await election.observe();
  console.log(observer.leader() ?? '-');
  observer.on('change', leader => console.log(leader ?? '-'));
  observer.on('error', fail);
}

({ campaign, observe })[command]().catch(fail);
