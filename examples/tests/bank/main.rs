//! Tests of the bank: decisions, the plan of a transfer under every fault, the whole bank on each store, and transfers
//! that are under way when a new build takes over.

mod decisions;
mod evolution;
mod plan;
mod running;

use std::time::Duration;

use annals::Repository;
use bank::transfer::Transfer;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Waits until a transfer is completed or rejected.
async fn ended(transfers: &Repository<Transfer>, id: &str) -> Result<Transfer, Box<dyn std::error::Error>> {
    loop {
        match transfers.state(id).await? {
            Transfer::Unknown | Transfer::UnderWay => tokio::time::sleep(Duration::from_millis(10)).await,
            ended => return Ok(ended),
        }
    }
}
