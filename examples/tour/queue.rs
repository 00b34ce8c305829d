//! A queue of work, whose workers give back, die, and cannot do what they are asked to.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::etcd_client::{Txn, TxnOp};
use etcd_recipes::{Claim, Queue, Session, SessionState};

use super::{Cast, chapter, is_lost, lease, read, see, tell, until};

/// How often an item is delivered before it is given up.
const ATTEMPTS: u32 = 3;

/// One item goes from worker to worker until one of them is done with it.
pub(crate) async fn deliver(cast: &mut Cast) -> Result<()> {
    chapter("A queue, and a worker that dies");
    let [for_alice, for_bob, for_carol] = [&cast.alice, &cast.bob, &cast.carol].map(|who| queue(cast, who));
    let (for_alice, for_bob, for_carol) = (for_alice?, for_bob?, for_carol?);

    tell("Alice puts a photo into the queue. Bob claims it: it stays there, hidden from all others.");
    for_alice.enqueue("photo-1").await?;
    let bob = for_bob.claim().await?;
    ensure!(for_carol.try_dequeue().await?.is_none(), "Carol got what Bob has claimed");
    show("bob", &bob, 1)?;
    see(&format!("items in the queue: {}; for carol: none", for_alice.length().await?));

    tell("Carol waits. Bob gives the photo back, and she has it.");
    let carol = tokio::spawn(async move { for_carol.claim().await });
    let token = bob.token();
    bob.release(Duration::ZERO).await?;
    let carol = carol.await.context("Carol's task")??;
    show("carol", &carol, 2)?;
    ensure!(carol.token() > token, "the token did not grow");

    tell(
        "Carol's machine falls silent; her lease is revoked, as it would expire. Bob, who waits, has the photo.",
    );
    let waiting = tokio::spawn({
        let for_bob = for_bob.clone();
        async move { (for_bob.claim().await, Instant::now()) }
    });
    let begin = Instant::now();
    cast.operator.lease_revoke(lease(&cast.carol)?).await?;
    let (bob, at) = waiting.await.context("Bob's task")?;
    let mut bob = bob?;
    show("bob", &bob, 3)?;
    see(&format!("that was {:.1?} after her lease began to end", at - begin));

    tell("Carol wakes up and acks. She is refused: the photo is not hers any more.");
    carol.lost().await;
    ensure!(is_lost(carol.ack().await), "Carol acked what Bob has");
    see("carol: refused");

    tell("Bob writes the thumbnail and acks in one transaction: both happen, and once, or neither does.");
    let key = format!("{}/thumbnail-1", cast.name);
    bob.ack_with(Txn::new().and_then([TxnOp::put(key.as_str(), "by bob", None)])).await?;
    let written = read(&mut cast.operator, &key).await?;
    ensure!(
        written == "by bob" && for_alice.length().await? == 0,
        "the ack and the write are not both there"
    );
    see(&format!("the thumbnail was written {written}; items in the queue: 0"));

    cast.operator.delete(key, None).await?;
    let mut state = cast.carol.watch_state();
    let again = |state: &SessionState| *state == SessionState::Connected { generation: 2 };
    state.wait_for(again).await.context("Carol has no new lease")?;
    Ok(())
}

/// An item that nobody can work on does not hold up the others.
pub(crate) async fn give_up(cast: &Cast) -> Result<()> {
    chapter("Dead letters");
    let (for_alice, for_bob) = (queue(cast, &cast.alice)?, queue(cast, &cast.bob)?);

    tell(&format!(
        "No worker can read photo-2. Bob gives it back again and again; {ATTEMPTS} attempts are all."
    ));
    for_alice.enqueue("photo-2").await?;
    for attempt in 1..=ATTEMPTS {
        let bob = for_bob.claim().await?;
        show("bob", &bob, attempt)?;
        bob.release(Duration::ZERO).await?;
    }

    tell("The next who claims gets the photo behind it, and photo-2 goes to the dead letters.");
    for_alice.enqueue("photo-3").await?;
    let alice = for_alice.claim().await?;
    ensure!(alice.value() == b"photo-3", "photo-2 was delivered once more");
    show("alice", &alice, 1)?;
    alice.ack().await?;
    until(async || Ok(!for_alice.dead_letters().await?.is_empty())).await?;
    let letters = for_alice.dead_letters().await?;
    let [letter] = &letters[..] else { anyhow::bail!("{} dead letters", letters.len()) };
    ensure!(letter.value == b"photo-2" && letter.attempts == ATTEMPTS, "another letter is dead");
    see(&format!("dead: {}, {}", String::from_utf8_lossy(&letter.value), letter.reason));

    tell("With a better program it is put back, and starts anew. This time it is done.");
    ensure!(for_alice.requeue(letter).await?, "the letter is not there");
    let alice = for_alice.claim().await?;
    ensure!(alice.value() == b"photo-2", "another item was put back");
    show("alice", &alice, 1)?;
    alice.ack().await?;
    let left = (for_alice.length().await?, for_alice.dead_letters().await?.len());
    ensure!(left == (0, 0), "items and dead letters are left: {left:?}");
    see("items in the queue: 0; dead letters: 0");
    Ok(())
}

fn queue(cast: &Cast, who: &Session) -> Result<Queue> {
    let name = format!("{}/photos", cast.name);
    Ok(Queue::builder(who, name).max_attempts(ATTEMPTS).build()?)
}

/// Shows a claim and checks which attempt it is.
fn show(who: &str, claim: &Claim, attempt: u32) -> Result<()> {
    let value = String::from_utf8_lossy(claim.value());
    see(&format!("{who} has {value}, attempt {}, with the token {}", claim.attempt(), claim.token()));
    ensure!(claim.is_held() && claim.attempt() == attempt, "it should have been attempt {attempt}");
    Ok(())
}
