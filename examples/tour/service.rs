//! Servers that register themselves, and a client that finds them.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::service::formats::Json;
use etcd_recipes::service::{
    Balancer, Change, Changes, Discovery, Instance, Policy, Registration, RegistrationState, Services,
};
use futures::StreamExt as _;

use super::{Cast, chapter, see, tell, until};

const ALICE: &str = "10.0.0.1:8400";
const BOB: &str = "10.0.0.2:8400";

/// Alice and Bob serve, Carol calls.
pub(crate) async fn come_and_go(cast: &mut Cast) -> Result<()> {
    chapter("A service");
    let format = Json::under(format!("{}/services/", cast.name));
    let services =
        [&cast.alice, &cast.bob, &cast.carol].map(|who| Services::with_format(who, format.clone()));
    let [of_alice, of_bob, of_carol] = services;

    tell("Carol follows the service `courseware`. Alice and Bob register, and she sees them come.");
    let discovery = of_carol.discover("courseware").open().await?;
    let mut changes = discovery.changes();
    ensure!(discovery.snapshot().instances.is_empty(), "somebody is there already");
    let alice = of_alice.register(Instance::new("courseware", ALICE)).await?;
    expect(&mut changes, &format!("{ALICE} has come")).await?;
    let bob = of_bob.register(Instance::new("courseware", BOB)).await?;
    expect(&mut changes, &format!("{BOB} has come")).await?;

    tell("Alice has a larger machine now, and says so. Of four calls she takes three.");
    alice.update(|instance| instance.weight = 3).await?;
    expect(&mut changes, &format!("{ALICE} has the weight 3")).await?;
    let calls = four_calls(&discovery)?;
    ensure!(calls.iter().filter(|address| **address == ALICE).count() == 3, "the calls were {calls:?}");
    see(&format!("calls: {}", calls.join(", ")));

    come_back(cast, &alice, &discovery).await?;

    tell("Alice deregisters before she stops: nobody calls her any more.");
    alice.deregister().await?;
    ensure!(alice.state() == RegistrationState::Deregistered, "Alice is still registered");
    // She reads only now, so she hears nothing of what came and went in between.
    expect(&mut changes, &format!("{ALICE} has gone")).await?;
    let calls = four_calls(&discovery)?;
    ensure!(calls == [BOB; 4], "the calls were {calls:?}");
    see(&format!("calls: {}", calls.join(", ")));

    tell("Bob's registration is dropped, and that is enough.");
    drop(bob);
    expect(&mut changes, &format!("{BOB} has gone")).await?;
    ensure!(discovery.snapshot().instances.is_empty(), "somebody is left");
    Ok(())
}

/// Somebody deletes the key of a registration.
async fn come_back(cast: &mut Cast, alice: &Registration, discovery: &Discovery) -> Result<()> {
    tell("An operator deletes Alice's key. She still serves, so her registration comes back by itself.");
    let begin = Instant::now();
    let deleted = cast.operator.delete(alice.key(), None).await?;
    ensure!(deleted.deleted() == 1, "Alice had no key");
    let revision = deleted.header().context("no revision")?.revision();
    let mut operator = cast.operator.clone();
    until(async || {
        let answer = operator.get(alice.key(), None).await?;
        Ok(answer.kvs().first().is_some_and(|key| key.create_revision() > revision))
    })
    .await?;
    see(&format!("deleted at the revision {revision}, and back {:.1?} later", begin.elapsed()));
    until(async || {
        let known = discovery.snapshot();
        Ok(known.revision > revision && known.instances.len() == 2)
    })
    .await?;
    // etcd's answer to her comes about as soon as the news to the others.
    until(async || Ok(alice.state() == RegistrationState::Registered)).await?;
    see(&format!("carol finds both, {ALICE} with the weight {}", weight(discovery, ALICE)?));
    ensure!(weight(discovery, ALICE)? == 3, "she came back with another weight");
    Ok(())
}

/// Who takes the next four calls.
fn four_calls(discovery: &Discovery) -> Result<Vec<String>> {
    let (balancer, known) = (Balancer::new(Policy::WeightedRoundRobin), discovery.snapshot());
    let call = |_| balancer.pick(&known.instances).map(|pick| pick.instance().address.clone());
    (0..4).map(call).collect::<Option<_>>().context("nobody is there")
}

fn weight(discovery: &Discovery, address: &str) -> Result<u32> {
    let known = discovery.snapshot();
    let instance = known.instances.iter().find(|instance| instance.address == address);
    Ok(instance.context("she is not there")?.weight)
}

/// Takes the next change and checks it.
async fn expect(changes: &mut Changes, what: &str) -> Result<()> {
    let told = match changes.next().await.context("Carol's stream ended")? {
        Change::Added(instance) => format!("{} has come", instance.address),
        Change::Updated { after, .. } => format!("{} has the weight {}", after.address, after.weight),
        Change::Removed(instance) => format!("{} has gone", instance.address),
        other => format!("{other:?}"),
    };
    see(&format!("carol sees: {told}"));
    ensure!(told == what, "Carol should have seen that {what}");
    Ok(())
}
