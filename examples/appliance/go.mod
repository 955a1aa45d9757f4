module appliance

go 1.26
