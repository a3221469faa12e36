"""Steps whose numbers are not finite or jump: found before they update anything, left out or undone, and explained."""
