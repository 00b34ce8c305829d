//! A lock, a waiter, and the hand-over between them.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::{Mutex, Participant};

use super::{Cast, chapter, see, tell, until};

/// Alice holds the lock, Bob waits for it, Carol does not want to wait.
pub(crate) async fn hand_over(cast: &Cast) -> Result<()> {
    chapter("A lock");
    let name = format!("{}/reports", cast.name);
    let mutexes = [&cast.alice, &cast.bob, &cast.carol].map(|session| Mutex::new(session, &name));
    let [for_alice, for_bob, for_carol] = mutexes;
    let (for_alice, for_bob, for_carol) = (for_alice?, for_bob?, for_carol?);

    tell("Alice locks. Nobody is there, so it is a single request.");
    let begin = Instant::now();
    let alice = for_alice.lock().await?;
    ensure!(alice.is_held(), "Alice does not hold the lock");
    see(&format!("alice has it after {:.1?}, with the fencing token {}", begin.elapsed(), alice.token()));
    see(&format!("her place in line is the key {}", String::from_utf8_lossy(alice.key())));

    tell("Bob locks, too, and stands in line behind her.");
    let bob = tokio::spawn(async move {
        let guard = for_bob.lock().await;
        (guard, Instant::now())
    });
    until(async || Ok(for_carol.waiters().await?.len() == 1)).await?;
    let (holder, waiters) = (for_carol.holder().await?, for_carol.waiters().await?);
    see(&format!("holder: {}; waiting: {}", names(&holder), names(&waiters)));
    ensure!(names(&holder) == "alice" && names(&waiters) == "bob", "the line is wrong");

    tell("Carol only tries. She gets no place in line, and an answer at once.");
    let carol = for_carol.try_lock().await?;
    ensure!(carol.is_none(), "Carol got a lock that Alice holds");
    see("try_lock: None");

    tell("Alice unlocks. Bob is ready for the moment her key goes; it takes him no further request.");
    let (token, begin) = (alice.token(), Instant::now());
    alice.unlock().await?;
    let (bob, at) = bob.await.context("Bob's task")?;
    let bob = bob?;
    ensure!(bob.token() > token, "the token did not grow");
    see(&format!("bob has it {:.1?} after she began, with the token {}", at - begin, bob.token()));
    tell(&format!("A store that has seen {} refuses {token} from now on: tokens only grow.", bob.token()));
    bob.unlock().await?;
    ensure!(for_carol.holder().await?.is_none(), "somebody holds the lock");
    Ok(())
}

fn names<'a>(participants: impl IntoIterator<Item = &'a Participant>) -> String {
    let names = participants.into_iter().map(|participant| participant.identity.as_deref().unwrap_or("?"));
    names.collect::<Vec<_>>().join(", ")
}
