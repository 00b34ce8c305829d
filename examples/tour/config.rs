//! A configuration that is read from memory and changed under everybody's eyes.

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::ConfigCache;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{Cast, chapter, see, tell, until};

/// Requests that are let through.
type Limit = u32;

/// What the handler has heard: the revision and the value, if there is one.
type Heard = (i64, Option<String>);

/// Alice publishes, Bob is told, and neither overwrites the other unseen.
pub(crate) async fn publish(cast: &mut Cast) -> Result<()> {
    chapter("A configuration in memory");
    let name = format!("{}/config", cast.name);
    let alice = ConfigCache::open(&cast.alice, &name).await?;
    let bob = ConfigCache::open(&cast.bob, &name).await?;

    tell("Bob has a handler for the key `limit`. Alice publishes it, and the handler is called.");
    let (tell_us, mut heard) = unbounded_channel();
    let _handler = bob.on_key("limit", move |change| {
        let value = change.value().map(|value| String::from_utf8_lossy(value).into_owned());
        tell_us.send((change.revision, value))
    });
    let revision = alice.publish("limit", "100").await?;
    expect(&mut heard, revision, Some("100")).await?;

    tell("Alice reads her own write: she waits until her cache has come to its revision.");
    alice.wait_for(revision).await?;
    ensure!(limit(&alice)? == 100, "Alice does not see what she wrote");
    see(&format!("alice reads {} from memory, at the revision {}", limit(&alice)?, alice.revision()));

    tell("Both change what they have read, only if it is still the same. Alice comes first; Bob is refused.");
    bob.wait_for(revision).await?;
    let seen = bob.get("limit").context("Bob sees no limit")?.revision();
    let by_alice = alice.publish_if("limit", seen, "150").await?.context("Alice was refused")?;
    let by_bob = bob.publish_if("limit", seen, "200").await?;
    ensure!(by_bob.is_none(), "Bob overwrote what he had not seen");
    see(&format!("alice: written at {by_alice}; bob: refused, {seen} is not the newest"));
    expect(&mut heard, by_alice, Some("150")).await?;

    tell("He waits for hers, reads, and tries again.");
    bob.wait_for(by_alice).await?;
    let now = bob.get("limit").context("Bob sees no limit")?;
    ensure!(now.revision() == by_alice, "Bob does not see what Alice wrote");
    let more = (limit(&bob)? + 50).to_string();
    let by_bob = bob.publish_if("limit", now.revision(), more).await?.context("Bob was refused again")?;
    expect(&mut heard, by_bob, Some("200")).await?;

    tell("An operator mistypes it. That is told, and the last good value stays.");
    let mistyped = cast.operator.put(format!("{name}/limit"), "25O", None).await?;
    let revision = mistyped.header().context("no revision")?.revision();
    expect(&mut heard, revision, Some("25O")).await?;
    until(async || Ok(!bob.bad_values().is_empty())).await?;
    ensure!(limit(&bob)? == 200, "the last good value is gone");
    see(&format!("bad values: {}; bob reads {}", bob.bad_values().len(), limit(&bob)?));

    tell("Alice deletes the key.");
    let revision = alice.delete("limit").await?.context("there was no key")?;
    expect(&mut heard, revision, None).await?;
    bob.wait_for(revision).await?;
    ensure!(bob.snapshot().is_empty(), "Bob still has it");
    Ok(())
}

fn limit(config: &ConfigCache) -> Result<Limit> {
    Ok(*config.get_as::<Limit>("limit")?.context("there is no limit")?)
}

/// Takes what the handler heard next and checks it.
async fn expect(heard: &mut UnboundedReceiver<Heard>, revision: i64, value: Option<&str>) -> Result<()> {
    let (at, told) = heard.recv().await.context("the handler is gone")?;
    see(&format!("bob is told: {}, at the revision {at}", told.as_deref().unwrap_or("deleted")));
    ensure!(at == revision && told.as_deref() == value, "he should have been told {value:?} at {revision}");
    Ok(())
}
