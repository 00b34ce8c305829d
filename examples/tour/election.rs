//! An election with two candidates and an observer.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::{Election, Observe};
use futures::StreamExt as _;

use super::{Cast, chapter, see, tell, until};

/// Alice leads, then Bob; Carol looks on.
pub(crate) async fn change_leader(cast: &Cast) -> Result<()> {
    chapter("An election");
    let name = format!("{}/indexer", cast.name);
    let (for_alice, for_bob) = (Election::new(&cast.alice, &name)?, Election::new(&cast.bob, &name)?);
    let mut carol = Election::new(&cast.carol, &name)?.observe();

    tell("Carol observes. She does not run; she wants to know where the leader is.");
    expect(&mut carol, None).await?;

    tell("Alice campaigns with her address and leads at once.");
    let alice = for_alice.campaign("alice:8080").await?;
    ensure!(alice.is_held(), "Alice does not lead");
    expect(&mut carol, Some("alice:8080")).await?;

    tell("Bob campaigns, too, and waits.");
    let bob = tokio::spawn({
        let for_bob = for_bob.clone();
        async move { for_bob.campaign("bob:8080").await }
    });
    until(async || Ok(for_alice.candidates().await?.len() == 2)).await?;
    let leader = for_bob.leader().await?.context("nobody leads")?;
    ensure!(leader.key == alice.key() && !bob.is_finished(), "Alice does not lead alone");
    see(&format!("candidates: 2; leader: {}", String::from_utf8_lossy(&leader.value)));

    tell("Alice proclaims another address. It is hers to change only while she leads.");
    alice.proclaim("alice:9090").await?;
    expect(&mut carol, Some("alice:9090")).await?;

    tell("Alice resigns, and Bob leads.");
    let (token, begin) = (alice.token(), Instant::now());
    alice.resign().await?;
    let bob = bob.await.context("Bob's task")??;
    see(&format!(
        "bob leads {:.1?} after she began, with the token {} after {token}",
        begin.elapsed(),
        bob.token()
    ));
    ensure!(bob.token() > token, "the token did not grow");
    expect(&mut carol, Some("bob:8080")).await?;

    tell("Bob resigns, and nobody is left.");
    bob.resign().await?;
    expect(&mut carol, None).await?;
    Ok(())
}

/// Takes Carol's next observation and checks who leads.
async fn expect(carol: &mut Observe, value: Option<&str>) -> Result<()> {
    let observation = carol.next().await.context("Carol's stream ended")??;
    let leader = observation.leader.map(|leader| String::from_utf8_lossy(&leader.value).into_owned());
    see(&format!(
        "carol sees: {}, at revision {}",
        leader.as_deref().unwrap_or("no leader"),
        observation.revision
    ));
    ensure!(leader.as_deref() == value, "Carol should have seen {value:?}");
    Ok(())
}
