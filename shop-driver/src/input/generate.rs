use std::collections::HashSet;

use fastrand::Rng;
use rust_decimal::Decimal;

use super::invoice::{Invoice, Line};

const SKUS: u64 = 1_000;
const CUSTOMERS: u64 = 5_000;
const LINES_MAX: usize = 3;
const QUANTITY_MAX: u32 = 5;
const PENNIES_MIN: i64 = 50;
const PENNIES_MAX: i64 = 49_99;
/// The weight of the most popular SKU. The weight of any other SKU is this number divided by the SKU's rank.
const WEIGHT: u64 = 1_000_000_000;

/// Orders generated from a seed: the same seed gives the same orders on every machine.
///
/// A few SKUs are popular and most are not, as in a real shop (Zipf's law with exponent 1: the SKU of rank n is ordered
/// 1/n times as often as the SKU of rank 1). One customer in ten is a guest.
#[derive(Clone, Debug)]
pub struct Generated {
    seed: u64,
    count: u64,
    made: u64,
    random: Rng,
    prices: Vec<Decimal>,
    /// For each rank, the sum of the weights of all SKUs up to that rank. The sums are whole numbers, because the
    /// rounding of other numbers could differ between machines.
    ranks: Vec<u64>,
}

/// Generates `count` orders from `seed`.
pub fn generate(count: u64, seed: u64) -> Generated {
    let mut random = Rng::with_seed(seed);
    let prices = (0..SKUS).map(|_| Decimal::new(random.i64(PENNIES_MIN..=PENNIES_MAX), 2)).collect();
    let ranks = (1..=SKUS)
        .scan(0, |sum, rank| {
            *sum += WEIGHT / rank;
            Some(*sum)
        })
        .collect();
    Generated { seed, count, made: 0, random, prices, ranks }
}

impl Generated {
    fn rank(&mut self) -> usize {
        let all = self.ranks.last().copied().unwrap_or(1);
        let drawn = self.random.u64(0..all);
        self.ranks.partition_point(|sum| *sum <= drawn)
    }

    fn line(&mut self, rank: usize) -> Line {
        let quantity = self.random.u32(1..=QUANTITY_MAX);
        Line { sku: format!("G{:04}", rank + 1), quantity, unit_price: self.prices[rank] }
    }
}

impl Iterator for Generated {
    type Item = Invoice;

    fn next(&mut self) -> Option<Invoice> {
        if self.made == self.count {
            return None;
        }
        self.made += 1;
        // All ids have the same width, like real invoice numbers. The ids therefore sort in the order of their
        // creation, and events that are written together are neighbours in an index.
        let id = format!("g{}-{:06}", self.seed, self.made);
        let guest = self.random.u8(0..10) == 0;
        let customer = self.random.u64(1..=CUSTOMERS);
        let wanted = self.random.usize(1..=LINES_MAX);
        let mut taken = HashSet::new();
        let mut lines = Vec::with_capacity(wanted);
        while lines.len() < wanted {
            let rank = self.rank();
            if taken.insert(rank) {
                let line = self.line(rank);
                lines.push(line);
            }
        }
        Some(Invoice::Order { id, customer: (!guest).then(|| format!("c{customer}")), lines })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.count - self.made).unwrap_or(usize::MAX);
        (left, Some(left))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::input::demand::demand;

    #[test]
    fn a_seed_makes_the_same_orders() {
        let seven: Vec<_> = generate(500, 7).collect();
        assert_eq!(generate(500, 7).collect::<Vec<_>>(), seven);
        assert_eq!(generate(100, 7).collect::<Vec<_>>(), seven[..100]);
        assert_ne!(
            generate(500, 8).map(|order| order.total()).collect::<Vec<_>>(),
            seven.iter().map(Invoice::total).collect::<Vec<_>>()
        );
        assert_eq!((seven[0].id(), seven[499].id()), ("g7-000001", "g7-000500"));
    }

    #[test]
    fn orders_have_one_to_three_distinct_lines_and_a_price_per_sku() {
        let mut prices = BTreeMap::new();
        let mut seen = [0; LINES_MAX];
        let mut guests = 0;
        for invoice in generate(5_000, 7) {
            let Invoice::Order { lines, customer, .. } = invoice else { panic!("not an order") };
            seen[lines.len() - 1] += 1;
            guests += u32::from(customer.is_none());
            let skus: HashSet<_> = lines.iter().map(|line| &line.sku).collect();
            assert_eq!(skus.len(), lines.len());
            for line in &lines {
                assert!((1..=5).contains(&line.quantity));
                assert_eq!(line.unit_price.scale(), 2);
                assert!((Decimal::new(50, 2)..=Decimal::new(4999, 2)).contains(&line.unit_price));
                assert_eq!(*prices.entry(line.sku.clone()).or_insert(line.unit_price), line.unit_price);
            }
        }
        assert!(seen.iter().all(|orders| (1_500..1_850).contains(orders)), "{seen:?}");
        assert!((400..600).contains(&guests), "{guests}");
    }

    #[test]
    fn the_first_sku_sells_twice_the_second_and_ten_times_the_tenth() {
        let demand = demand(generate(50_000, 7));
        assert!(demand.len() > 990 && demand.len() <= 1_000, "{}", demand.len());
        let first = demand["G0001"] as f64;
        let second = demand["G0002"] as f64;
        let tenth = demand["G0010"] as f64;
        assert!((1.7..2.2).contains(&(first / second)), "{first} {second}");
        assert!((8.0..11.0).contains(&(first / tenth)), "{first} {tenth}");
    }
}
