"""TAFF-UNet: myocardial scar from LGE, ECG and the AHA-17 atlas."""
